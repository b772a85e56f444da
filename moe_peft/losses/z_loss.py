"""Router z-loss: mean over valid tokens of logsumexp(z)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""

from __future__ import annotations

import torch

from ..types import RouterLoss, Routing
from .masking import masked_sum, num_valid


class ZLoss(RouterLoss):
    """Keeps the router logits small; zero when every token's logits have a log-sum-exp of zero."""

    def sums(self, routing: Routing) -> torch.Tensor:
        """(2,) sum of the squares, and the number of valid tokens."""
        squares_T = routing.logits.logsumexp(dim=-1).square()
        return torch.stack([masked_sum(squares_T, routing), num_valid(routing)])

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., 2) sums."""
        return sums[..., 0] / sums[..., 1].clamp_min(1)


z_loss = ZLoss()
