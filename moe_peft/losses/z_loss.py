"""Router z-loss: mean over valid tokens of logsumexp(z)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""

from __future__ import annotations

import torch

from ..types import RouterLoss, Routing
from .masking import masked_sum, num_valid


class ZLoss(RouterLoss):
    """Keeps the router logits small; zero when every token's logits have a log-sum-exp of zero."""

    of_softmax = True

    def stacks_by(self) -> tuple[()]:
        """Any; see `RouterLoss.stacks_by`."""
        return ()

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., 2) sum of the squares, and the number of valid tokens."""
        squares = masked_sum(routing.logits.logsumexp(dim=-1).square(), routing)
        return torch.stack([squares, num_valid(routing).expand_as(squares)], dim=-1)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., 2) sums."""
        return sums[..., 0] / sums[..., 1].clamp_min(1)


z_loss = ZLoss()
