"""Low-rank experts whose down matrices are sparse, random and never trained: y = base + s sum_e g_e B_e A_e x.

FlyLoRA (Zou et al., arXiv 2510.08396): experts of rank one, whose rows of A have D K / E numbers that are not zero,
normal with standard deviation 1 / E. The matrices are saved, as a seed alone would be no contract between versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..part import Option
from .low_rank import LowRankArgs, LowRankExperts

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SparseDownExperts(LowRankExperts):
    """A bank of low-rank pairs of which only the up matrices train.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        density: Share of the elements of a row of A that are not zero, at least one of them.
        **common: See `LowRankExperts`; `init_weights` for B alone.

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
        density: float = 0.25,
        **common: Unpack[LowRankArgs],
    ) -> None:
        super().__init__(in_features, out_features, **common)
        self.A.requires_grad_(False)
        count = max(1, round(density * in_features))
        kept = torch.rand_like(self.A).argsort(-1).argsort(-1) < count
        with torch.no_grad():
            self.A.copy_((torch.randn_like(self.A) / self.num_choices).masked_fill(~kept, 0.0))
