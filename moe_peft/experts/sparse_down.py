"""Low-rank experts whose down matrices are sparse, random and never trained: y = base + s sum_e g_e B_e A_e x.

FlyLoRA (Zou et al., arXiv 2510.08396): experts of rank one, whose rows of A have D K / E numbers that are not zero,
normal with standard deviation 1 / E. The matrices are saved, as a seed alone would be no contract between versions.
"""

from __future__ import annotations

import torch

from ..ops import AUTO
from ..part import Option
from .low_rank import LowRankExperts


class SparseDownExperts(LowRankExperts):
    """A bank of low-rank pairs of which only the up matrices train.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        num_experts: E.
        r: Rank of one expert.
        scaling: See `LowRankExperts`.
        lora_dropout: See `LowRankExperts`.
        init_weights: See `LowRankExperts`, for B alone.
        experts_implementation: See `LowRankExperts`.
        shared: See `LowRankExperts`.
        density: Share of the elements of a row of A that are not zero, at least one of them.

    Attributes:
        A: (E + S, r, D) down matrices, never trained.
        B: (E + S, r, O) up matrices, stored transposed.
    """

    options = (
        *LowRankExperts.options,
        Option(
            "density",
            0.25,
            "a number above 0, up to 1",
            lambda value: not isinstance(value, bool) and 0 < value <= 1,
            "Share of the elements of a row of the down matrices that are not zero.",
        ),
    )
    frozen = ("A",)
    mergeable = True
    casts_input = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        r: int,
        scaling: float,
        lora_dropout: float = 0.0,
        init_weights: bool | str = True,
        experts_implementation: str = AUTO,
        shared: int = 0,
        density: float = 0.25,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            num_experts=num_experts,
            r=r,
            scaling=scaling,
            lora_dropout=lora_dropout,
            init_weights=init_weights,
            experts_implementation=experts_implementation,
            shared=shared,
        )
        self.A.requires_grad_(False)
        count = max(1, round(density * in_features))
        kept = torch.rand_like(self.A).argsort(-1).argsort(-1) < count
        with torch.no_grad():
            self.A.copy_((torch.randn_like(self.A) / num_experts).masked_fill(~kept, 0.0))
