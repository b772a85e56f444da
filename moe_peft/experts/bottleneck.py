"""Bottleneck experts: y = base + sum_e g_e B_e act(A_e dropout(x)), adapters with a nonlinearity (arXiv 1902.00751).

Without the scale of low-rank experts, as the parallel adapters of PERFT (arXiv 2508.02587) have none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

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
        lora_dropout: See `LowRankExperts`.
        init_weights: See `LowRankExperts`.
        experts_implementation: See `LowRankExperts`.
    """

    fields = ("activation", "lora_dropout", "init_weights", "experts_implementation")
    mergeable = False

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
        experts_implementation: str = "dense",
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
        )
        self.act = ACTIVATIONS[activation]
