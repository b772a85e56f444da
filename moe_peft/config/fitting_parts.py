"""Refuses parts of one layer that lack what they need of each other, or that a causal language model cannot use.

Configurations that choose parts by name ask the classes; here the parts themselves are asked, whoever has built them.
"""

from __future__ import annotations

from typing import Any

from ..messages import shown
from ..part import Part
from ..routers.registry import lets_nothing_pass
from .parts import RoutedParts


def check_fit(config: Any, parts: RoutedParts) -> None:
    """Check that parts go together, and with the model's task.

    Args:
        config: Configuration of the place, a `MoeConfig`.
        parts: What it builds there, on any device.

    Raises:
        ValueError: A part or a loss needs what no other gives, a gate lets none of its router's scores pass, or a
            later token or another row would change what a token of a causal language model gets.
    """
    built: tuple[object, ...] = (parts.router, parts.experts)
    made = [part for part in built if isinstance(part, Part)]
    _check_needs(type(config).__name__, parts, made)
    if config.task_type == "CAUSAL_LM" and not config.permits_non_causal:
        for part in made:
            if not part.decode_stateless and "cached" not in part.context_needs:
                raise ValueError(
                    f"{type(config).__name__}: {_called(part)} says that decoding token by token differs from the "
                    "full forward (`Part.decode_stateless`), and asks for no number of cached tokens by which it "
                    'could keep what it needs. Put "cached" into its `context_needs`, or choose another part.'
                )
            unsafe = "a later token changes an earlier one" if not part.causal else "other rows change a token"
            if not (part.causal and part.batch_invariant):
                raise ValueError(
                    f"{type(config).__name__}: with {_called(part)} {unsafe}, which a causal language model does not "
                    f"have when it writes. Choose another {'router' if part is parts.router else 'kind of experts'}."
                )


def _check_needs(owner: str, parts: RoutedParts, made: list[Part]) -> None:
    if parts.router is None:  # the decision is the backbone's
        return
    decision = parts.router.gives
    given = decision.union(*(part.gives for part in made))
    losses = {} if parts.objective is None else parts.objective.losses
    if lets_nothing_pass(parts.router, parts.router.gate):
        raise ValueError(
            f"{owner}: {_called(parts.router)} scores by logarithms of probabilities, and its gate lets scores above "
            "zero pass alone, so that no expert would ever be used. Choose another gate, as Softmax."
        )
    asking = [(_called(part), part.needs - given) for part in made]
    asking += [(f"the loss {shown(name)}", loss.needs - decision) for name, loss in losses.items()]
    for asks, lacking in asking:
        if lacking:
            words = ", ".join(sorted(lacking))
            beside = ", ".join(_called(part) for part in made)
            raise ValueError(
                f"{owner}: {asks} needs {words} (`Part.needs`), which none of {beside} gives (`Part.gives`). Put it "
                "beside a part that does."
            )


def _called(part: Part) -> str:
    """A part by its class; a router with its gate and selector."""
    own = [type(part).__name__]
    for name in ("gate", "select"):
        inner = getattr(part, name, None)
        own += [type(inner).__name__] if isinstance(inner, Part) else []
    return own[0] if len(own) == 1 else f"{own[0]} ({', '.join(own[1:])})"
