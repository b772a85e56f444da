"""The router losses of all places of a pass at once: their sums, and their derivative in what each place decided.

While a forward runs, a place leaves its decision here and nothing is computed. When the stack's forward ends, the
decisions of places that are alike are stacked; sums are taken (`measure`), joined and differentiated
(`joined_losses`), and their derivative is carried on to weights, probabilities and logits (`spread`):

    d loss / d p = d loss / d sums * d sums / d p         for the P places of a stack in one pass
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..types import RouterLoss, Routing
from .joined_losses import LayerLosses


@dataclass
class Measurement:
    """One call of a layer in a training pass.

    Attributes:
        losses: Its router losses.
        routing: Its decision, until the derivative is known.
        weights: (T, K) combine weights without graph, by which the calls of one module in a pass are told apart; None
            where there is one.
        gradients: Derivative of the losses in the decision's tensors, by name; None before it is known. What no loss
            reads has none.
        tied: Whether the output of its stack carries the gradient, so that the layer injects none.
    """

    losses: LayerLosses
    routing: Routing | None = None
    weights: torch.Tensor | None = None
    gradients: dict[str, torch.Tensor] | None = None
    tied: bool = False


class Places(Routing):
    """The decisions of P places, each tensor stacked when a loss first reads it.

    Args:
        routings: Decisions that are `_alike`.
        apart: Whether the stacked tensors are leaves of a graph of their own, for the derivative in them.
    """

    routings: Sequence[Routing]
    apart: bool
    made: dict[str, torch.Tensor]
    leaves: dict[str, torch.Tensor]

    def __init__(self, routings: Sequence[Routing], *, apart: bool) -> None:
        first = routings[0]
        self.__dict__.update(
            routings=routings, apart=apart, context=first.context, num_experts=first.num_experts, made={}, leaves={}
        )
        named = [routing.extras for routing in routings]
        extras = {name: self._stack(f"extras.{name}", [own[name] for own in named]) for name in first.extras}
        self.__dict__["extras"] = extras

    @property
    def token_dim(self) -> int:
        """See `Routing.token_dim`."""
        return 1

    @property
    def one(self) -> Routing:
        """See `Routing.one`."""
        return self.routings[0]

    @property
    def weights(self) -> torch.Tensor:
        """(P, T, K)."""
        return self._stack("weights", [routing.weights for routing in self.routings])

    @property
    def probs(self) -> torch.Tensor:
        """(P, T, E)."""
        return self._stack("probs", [routing.probs for routing in self.routings])

    @property
    def logits(self) -> torch.Tensor:
        """(P, T, E)."""
        return self._stack("logits", [routing.logits for routing in self.routings])

    @property
    def experts(self) -> torch.Tensor | None:
        """(P, T, K) int64, or None."""
        return self._optional("experts", [routing.experts for routing in self.routings])

    @property
    def dropped(self) -> torch.Tensor | None:
        """(P, T, K) bool, or None."""
        return self._optional("dropped", [routing.dropped for routing in self.routings])

    def place(self, number: int) -> Routing:
        """The decision of one place, as a part of the stacked tensors."""
        experts, dropped = (None if own is None else own[number] for own in (self.experts, self.dropped))
        return Routing(
            weights=self.weights[number],
            experts=experts,
            logits=self.logits[number],
            probs=self.probs[number],
            dropped=dropped,
            context=self.context,
            num_experts=self.num_experts,
            extras={name: own[number] for name, own in self.extras.items()},
        )

    def _optional(self, name: str, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return self._stack(name, present) if present else None

    def _stack(self, name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if name not in self.made:
            made = torch.stack(list(tensors))
            if self.apart and made.is_floating_point():
                made = self.leaves[name] = made.detach().requires_grad_()
            self.made[name] = made
        return self.made[name]


@dataclass
class Stack:
    """Calls that are measured together.

    Attributes:
        members: The P calls.
        places: Their decisions.
        sums: Name of a loss -> (P, N) sums with graph.
    """

    members: list[Measurement]
    places: Places
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


def measure(calls: Sequence[Measurement], *, apart: bool = True) -> list[Stack]:
    """Take the sums of all losses, and tell each call its own.

    Args:
        calls: Of one pass, in order.
        apart: Whether to make a graph of their own for `spread`; else the sums hang on the decisions' graph.
    """
    groups: list[list[Measurement]] = []
    for call in calls:
        group = next((own for own in groups if _alike(own[0], call)), None)
        if group is None:
            groups.append([call])
        else:
            group.append(call)
    stacks = []
    for members in groups:
        stack = Stack(members, Places([call.routing for call in members if call.routing is not None], apart=apart))
        for name, loss in members[0].losses.losses.items():
            if loss.stacks_by() is None:
                own = [call.losses.losses[name].sums(stack.places.place(p)) for p, call in enumerate(members)]
                stack.sums[name] = torch.stack(own)
            else:
                stack.sums[name] = loss.sums(stack.places)
            for call, own_N in zip(members, stack.sums[name].detach().unbind(), strict=True):
                call.losses.own[name] = own_N
        stacks.append(stack)
    return stacks


def spread(stacks: Sequence[Stack]) -> None:
    """Carry the derivative of the losses in their sums on to the decisions; the sums' gradients are known.

    Args:
        stacks: Of `measure`.
    """
    sums, gradients, leaves = [], [], []
    for stack in stacks:
        leaves += list(stack.places.leaves.values())
        for name, sums_PN in stack.sums.items():
            if sums_PN.requires_grad:
                sums.append(sums_PN)
                gradients.append(torch.stack([call.losses.gradients[name] for call in stack.members]).to(sums_PN))
    found = iter(torch.autograd.grad(sums, leaves, gradients, allow_unused=True) if sums else [None] * len(leaves))
    for stack in stacks:
        for call in stack.members:
            call.gradients, call.routing = {}, None
        for name in stack.places.leaves:
            gradient = next(found)
            for call, own in zip(stack.members, () if gradient is None else gradient.unbind(), strict=False):
                assert call.gradients is not None
                call.gradients[name] = own


@contextmanager
def own_graph() -> Iterator[None]:
    """Differentiate here, whatever the caller does: without gradients, in inference mode, or in a checkpoint.

    A checkpoint around the model would miss in its recomputation what is saved here.
    """
    own_saving = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    with torch.inference_mode(False), torch.enable_grad(), own_saving:
        yield


def tensors_of(routing: Routing) -> dict[str, torch.Tensor]:
    """The tensors of a decision that losses may have a gradient in, by name."""
    extras = {f"extras.{name}": own for name, own in routing.extras.items()}
    return {"weights": routing.weights, "probs": routing.probs, "logits": routing.logits, **extras}


def _alike(one: Measurement, other: Measurement) -> bool:
    """Whether two calls can be stacked: decisions of the same sizes about the same tokens, and the same losses."""
    a, b = one.routing, other.routing
    assert a is not None and b is not None
    return (
        a.context is b.context
        and a.num_experts == b.num_experts
        and _same_kind(a.weights, b.weights)
        and _same_kind(a.probs, b.probs)
        and _same_kind(a.logits, b.logits)
        and _same_kind(a.experts, b.experts)
        and _same_kind(a.dropped, b.dropped)
        and a.extras.keys() == b.extras.keys()
        and all(_same_kind(own, b.extras[name]) for name, own in a.extras.items())
        and _same_losses(one.losses.losses, other.losses.losses)
    )


def _same_losses(one: Mapping[str, RouterLoss], other: Mapping[str, RouterLoss]) -> bool:
    return list(one) == list(other) and all(
        type(loss) is type(other[name]) and loss.stacks_by() == other[name].stacks_by() for name, loss in one.items()
    )


def _same_kind(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
