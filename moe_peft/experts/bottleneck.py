"""Bottleneck experts: y = base + sum_e g_e B_e act(dropout(A_e x)), adapters with a nonlinearity (arXiv 1902.00751).

Experts may have activations of their own. Dropout acts in the
bottleneck, and there is no scale, as in the parallel adapters of PERFT's code (arXiv 2508.02587).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
from torch.nn import functional as F

from ..messages import shown
from ..ops import AUTO
from ..part import Option
from ..types import TokenContext
from .low_rank import LowRankExperts
from .reading import read_for_decision

if TYPE_CHECKING:
    from typing_extensions import Unpack

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class _Sizes(TypedDict):
    num_experts: int


class BottleneckArgs(_Sizes, total=False):
    """Keywords that the kind hands on to its base; see `LowRankExperts`."""

    lora_dropout: float
    init_weights: bool | str
    shared: int


class BottleneckExperts(LowRankExperts):
    """A bank of two-layer adapters.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        r: Width of one expert's bottleneck.
        activation: Name of the nonlinearity, see `ACTIVATIONS`.
        experts_implementation: See `LowRankExperts`.
        activations: Names of nonlinearities that experts have in turn, in place of `activation`; None for one for
            all. The sum is then computed by two products over all experts.
        **common: See `LowRankExperts`; `lora_dropout` acts on the elements of the bottleneck.
    """

    fields = ("activation", "lora_dropout", "init_weights", "experts_implementation")
    options = (
        *LowRankExperts.options,
        Option(
            "activations",
            None,
            f"None, or a list of names out of {', '.join(ACTIVATIONS)}",
            lambda value: (
                value is None or (isinstance(value, (list, tuple)) and len(value) > 0 and {*value} <= {*ACTIVATIONS})
            ),
            "Activations that experts have in turn, in place of one for all.",
        ),
    )
    mergeable = False
    splits = True
    act: Callable[[torch.Tensor], torch.Tensor]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        activation: str = "silu",
        experts_implementation: str = AUTO,
        activations: Sequence[str] | None = None,
        **common: Unpack[BottleneckArgs],
    ) -> None:
        if activations is not None and experts_implementation not in ("dense", AUTO):
            raise ValueError(
                f"experts_implementation={shown(experts_implementation)} must be 'auto' or 'dense' with experts_args="
                "{'activations': ...}: experts with activations of their own are computed together."
            )
        implementation = experts_implementation if activations is None else "dense"
        super().__init__(in_features, out_features, r=r, scaling=1.0, experts_implementation=implementation, **common)
        self.splits = self.splits and activations is None  # which expert has which goes by its number
        self.act = ACTIVATIONS[activation] if activations is None else partial(_in_turn, tuple(activations), r)

    def drop(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Leave the input as it is: dropout acts in the bottleneck."""
        return x_TD

    def drops(self, context: TokenContext) -> bool:
        """Whether `lora_dropout` acts in this pass."""
        return context.training and self.lora_dropout.p > 0

    def undropped(self, x_TD: torch.Tensor, h: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """The down projections, of which nothing is dropped; see `Experts.undropped`."""
        return read_for_decision(self, x_TD, h, context, dropped=False)

    def activation(self, context: TokenContext) -> Callable[[torch.Tensor], torch.Tensor]:
        """The nonlinearity, after dropout in training passes."""
        return (lambda h: self.act(self.lora_dropout(h))) if self.drops(context) else self.act


def _in_turn(names: Sequence[str], r: int, h_TR: torch.Tensor) -> torch.Tensor:
    """Give the r columns of expert e the activation e modulo their number.

    Args:
        names: Of activations.
        r: Width of one expert.
        h_TR: (T, E r) down projections.
    """
    experts = h_TR.unflatten(-1, (-1, r)).unbind(-2)
    return torch.cat([ACTIVATIONS[names[e % len(names)]](h_Tr) for e, h_Tr in enumerate(experts)], -1)
