"""Sparsity bound: the sparsity that a sparse simplex needs to leave at most k experts.

    L = mean over valid tokens of relu(lower - lambda),   lower = 1 - (sum_{i <= k} z_(i) - k z_(k+1))

LD-MoLE (arXiv 2509.25684). z_(i) are the scores in descending order: with lambda >= lower at most k experts have a
weight. The scores count as constants, so that lambda is moved and they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..part import Option
from ..types import RouterLoss, Routing
from .masking import masked_sum, num_valid


class SparsityBound(RouterLoss):
    """Zero where no token uses more than k experts.

    Args:
        active: k.
    """

    needs = frozenset({"sparsity"})
    options = (
        Option(
            "active",
            2,
            "a whole number from 1",
            lambda value: type(value) is int and value >= 1,
            "Experts that a token is to use at most, k.",
        ),
    )

    def __init__(self, *, active: int = 2) -> None:
        self.active = active

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """See `Part.misfit`."""
        if options["active"] < sizes["num_experts"]:
            return None
        return f"active={options['active']} must be less than num_experts={sizes['num_experts']}"

    def stacks_by(self) -> tuple[int]:
        """k; see `RouterLoss.stacks_by`."""
        return (self.active,)

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., 2) sum of what the tokens' sparsity lacks, and the number of valid tokens."""
        sorted_TE = routing.logits.detach().sort(dim=-1, descending=True).values
        kept_T, next_T = sorted_TE[..., : self.active].sum(-1), sorted_TE[..., self.active]
        lower_T = 1 - (kept_T - self.active * next_T)
        lacking_T = (lower_T - routing.extras["sparsity"]).relu()
        lacking = masked_sum(lacking_T, routing)
        return torch.stack([lacking, num_valid(routing).expand_as(lacking)], dim=-1)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., 2) sums."""
        return sums[..., 0] / sums[..., 1].clamp_min(1)
