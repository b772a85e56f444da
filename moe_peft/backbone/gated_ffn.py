"""Gated FFNs of a backbone: which linear layer is the gate, which the up and which the down projection.

    y = down(act(gate(x)) * up(x)),   gate and up apart, or the halves of one layer

Names say nothing for certain, so the module's own code is run on three numbers, with a tiny layer in the place of each
of its own: the roles are those with which the equation gives what the code gives. Weights are never looked at, so that
quantized, sharded and meta modules are told apart too.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .structure import base_of

# Widths of the tiny layers, all different.
IN, INNER = 3, 5
# Errors that code raises on layers that are put where others belong.
FAILURES = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class GatedFfn:
    """The parts of a gated FFN by the names of its attributes.

    Attributes:
        gate: The layer whose output passes the activation.
        up: The other layer that reads x; None where the gate's layer holds both.
        down: The layer that writes the output.
        act: The activation, a module or a function.
        dropout: The dropout, if there is one.
        drops_inner: Whether dropout acts before the down projection; after it otherwise.
        gate_first: Whether the gate is the first half of a layer that holds both.
    """

    gate: str
    up: str | None
    down: str
    act: str
    dropout: str | None = None
    drops_inner: bool = False
    gate_first: bool = True

    def read(self, ffn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What gate and up projection make of the input.

        Args:
            ffn: The module.
            x: (..., D) input.

        Returns:
            Two (..., F).
        """
        u = getattr(ffn, self.gate)(x)
        if self.up is not None:
            return u, getattr(ffn, self.up)(x)
        first, second = u.chunk(2, dim=-1)
        return (first, second) if self.gate_first else (second, first)

    def activate(self, ffn: nn.Module, u: torch.Tensor) -> torch.Tensor:
        """The activation of (..., F) numbers; arguments as in `read`."""
        return cast(torch.Tensor, getattr(ffn, self.act)(u))

    def write(self, ffn: nn.Module, v: torch.Tensor) -> torch.Tensor:
        """The output of what stands between the projections.

        Args:
            ffn: The module.
            v: (..., F).

        Returns:
            (..., O).
        """
        drop = getattr(ffn, self.dropout) if self.dropout is not None else None
        if drop is not None and self.drops_inner:
            v = drop(v)
        down = getattr(ffn, self.down)
        if type(down) is nn.Linear and not torch.is_autocast_enabled(v.device.type):
            v = v.to(down.weight.dtype)  # some models keep this layer alone in float32
        y = cast(torch.Tensor, down(v))
        return y if drop is None or self.drops_inner else drop(y)

    def widths(self, ffn: nn.Module) -> tuple[int, int, int]:
        """D, F and O of the module."""
        (in_features, inner), (_, out_features) = (_widths(getattr(ffn, name)) for name in (self.gate, self.down))
        return in_features, inner if self.up is not None else inner // 2, out_features


def gated_ffn(module: nn.Module) -> GatedFfn | None:
    """The parts of a gated FFN.

    Args:
        module: Any module, or a tuner layer around one.

    Returns:
        None for any other module, and for gated FFNs with more to them than the equation.
    """
    base = base_of(module)
    children = dict(base.named_children())
    linears = [name for name, child in children.items() if _is_linear(child)]
    others = {name: child for name, child in children.items() if name not in linears}
    if len(linears) not in (2, 3) or any(True for child in others.values() for _ in child.parameters()):
        return None
    dropouts = [name for name, child in others.items() if isinstance(child, nn.Dropout)]
    if len(dropouts) > 1 or any(True for _ in base.parameters(recurse=False)):
        return None
    functions = [name for name, value in vars(base).items() if callable(value) and name != "forward"]
    acts = [name for name in (*others, *functions) if name not in dropouts and not name.startswith("_")]
    for roles in _candidates(linears, acts, dropouts[0] if dropouts else None):
        if _fits(base, roles) and _agrees(base, roles):
            return roles
    return None


def _candidates(linears: list[str], acts: list[str], dropout: str | None) -> Iterator[GatedFfn]:
    for order, act, inner in itertools.product(itertools.permutations(linears), acts, (True, False)):
        if dropout is None and not inner:
            continue
        for first in (True,) if len(linears) == 3 else (True, False):
            up = order[1] if len(linears) == 3 else None
            yield GatedFfn(order[0], up, order[-1], act, dropout, inner and dropout is not None, first)


def _fits(base: nn.Module, roles: GatedFfn) -> bool:
    """Whether the layers' own widths are those of the roles."""
    joined = 2 if roles.up is None else 1
    (in_features, inner), (read, _) = _widths(getattr(base, roles.gate)), _widths(getattr(base, roles.down))
    return inner == joined * read and (roles.up is None or _widths(getattr(base, roles.up)) == (in_features, inner))


@torch.no_grad()
def _agrees(base: nn.Module, roles: GatedFfn) -> bool:
    """Whether the module's code computes the equation on tiny layers."""
    tiny = copy.copy(base)
    joined = 2 if roles.up is None else 1
    own: dict[str, nn.Module] = {roles.gate: _tiny(IN, joined * INNER, 1), roles.down: _tiny(INNER, IN, 2)}
    if roles.up is not None:
        own[roles.up] = _tiny(IN, INNER, 3)
    if roles.dropout is not None:
        own[roles.dropout] = _Double()
    tiny.__dict__["_modules"] = {**base._modules, **own}
    tiny.__dict__["training"] = True  # dropout that is no module shows itself
    x = torch.linspace(-1, 1.5, 2 * IN, dtype=torch.float64).view(1, 2, IN)
    forward: Callable[..., Any] = type(base).forward
    try:
        with torch.autocast("cpu", enabled=False):
            expected = forward(tiny, x)
            found = roles.write(tiny, roles.activate(tiny, roles.read(tiny, x)[0]) * roles.read(tiny, x)[1])
    except FAILURES:
        return False
    return isinstance(expected, torch.Tensor) and expected.shape == found.shape and torch.equal(found, expected)


class _Double(nn.Module):
    """Shows where dropout acts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def _tiny(in_features: int, out_features: int, seed: int) -> nn.Linear:
    with torch.device("cpu"):
        # With a bias, as dropout before a layer without one would look like dropout after it.
        layer = nn.Linear(in_features, out_features, dtype=torch.float64)
        for tensor in (layer.weight, layer.bias):
            values = torch.arange(tensor.numel(), dtype=torch.float64).mul(seed).add(seed).sin()
            tensor.data = values.view(tensor.shape)
    return layer


def _is_linear(module: nn.Module) -> bool:
    base = base_of(module)
    return all(hasattr(base, name) for name in ("in_features", "out_features")) or hasattr(base, "nf")


def _widths(module: nn.Module) -> tuple[int, int]:
    base = cast(Any, base_of(module))
    return (base.nx, base.nf) if hasattr(base, "nf") else (base.in_features, base.out_features)
