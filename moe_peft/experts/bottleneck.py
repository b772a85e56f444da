"""Bottleneck experts: y = base + sum_e g_e B_e act(dropout(A_e x)), adapters with a nonlinearity (arXiv 1902.00751).

Dropout acts in the bottleneck, and there is no scale, as in the parallel adapters of PERFT's code (arXiv 2508.02587).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..ops import AUTO
from ..types import TokenContext
from .low_rank import LowRankExperts

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class BottleneckExperts(LowRankExperts):
    """A bank of two-layer adapters.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        num_experts: E.
        r: Width of one expert's bottleneck.
        activation: Name of the nonlinearity, see `ACTIVATIONS`.
        lora_dropout: Probability that an element of the bottleneck is dropped in training passes.
        init_weights: See `LowRankExperts`.
        experts_implementation: See `LowRankExperts`.
        shared: See `LowRankExperts`.
    """

    fields = ("activation", "lora_dropout", "init_weights", "experts_implementation")
    mergeable = False
    act: Callable[[torch.Tensor], torch.Tensor]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        r: int,
        activation: str = "silu",
        lora_dropout: float = 0.0,
        init_weights: bool | str = True,
        experts_implementation: str = AUTO,
        shared: int = 0,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            num_experts=num_experts,
            r=r,
            scaling=1.0,
            lora_dropout=lora_dropout,
            init_weights=init_weights,
            experts_implementation=experts_implementation,
            shared=shared,
        )
        self.act = ACTIVATIONS[activation]

    def drop(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Leave the input as it is: dropout acts in the bottleneck."""
        return x_TD

    def drops(self, context: TokenContext) -> bool:
        """Whether `lora_dropout` acts in this pass."""
        return context.training and self.lora_dropout.p > 0

    def undropped(self, x_TD: torch.Tensor, h: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """The down projections, which nothing has been dropped of."""
        return h

    def activation(self, context: TokenContext) -> Callable[[torch.Tensor], torch.Tensor]:
        """The nonlinearity, after dropout in training passes."""
        return (lambda h: self.act(self.lora_dropout(h))) if self.drops(context) else self.act
