"""Certain tokens, balanced experts: L = (b - H(mean p) / log E)+ + (mean H(p) / log E - c)+, H the entropy in nats.

The auxiliary loss of HMoRA (Liao et al., ICLR 2025): the entropy of the mean over valid tokens is raised up to a share
b of the largest, log E, and the mean of the entropies is lowered down to a share c of it; beyond both targets it is
zero. Probabilities are taken over their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..part import Option
from ..types import RouterLoss, Routing
from .entropy import entropy
from .masking import masked_sum, num_valid, shares


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


class CertaintyBalance(RouterLoss):
    """Loss of one place.

    Args:
        balance: b, share of the largest entropy that the experts' mean probabilities are to reach.
        certainty: c, share of it that a token's probabilities are to fall to in the mean.
    """

    options = (
        Option("balance", 0.98, "a number from 0 to 1", _is_share, "Share of the largest entropy, of experts' use."),
        Option("certainty", 0.5, "a number from 0 to 1", _is_share, "Share of it that tokens are to fall to."),
    )

    def __init__(self, *, balance: float = 0.98, certainty: float = 0.5) -> None:
        self.balance, self.certainty = balance, certainty

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """See `Part.misfit`."""
        if options["certainty"] <= options["balance"]:
            return None
        return f"certainty={options['certainty']} must be at most balance={options['balance']}"

    def stacks_by(self) -> tuple[float, float]:
        """The targets; see `RouterLoss.stacks_by`."""
        return (self.balance, self.certainty)

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., E + 4) summed probabilities and entropies of tokens, their number, and it times each target."""
        p_TE = shares(routing.probs)
        entropy_T1 = entropy(p_TE)[..., None]
        sums = masked_sum(torch.cat([p_TE, entropy_T1], -1), routing)
        tokens = num_valid(routing).expand_as(sums[..., :1])
        return torch.cat([sums, tokens, self.balance * tokens, self.certainty * tokens], -1)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., E + 4) sums."""
        num_experts = sums.shape[-1] - 4
        tokens = sums[..., -3].clamp_min(1)
        q_E = sums[..., :num_experts] / tokens[..., None]
        largest = torch.log(torch.full_like(tokens, max(num_experts, 2)))
        used = entropy(q_E) / largest
        certain = sums[..., num_experts] / tokens / largest
        target_used, target_certain = sums[..., -2] / tokens, sums[..., -1] / tokens
        return (target_used - used).relu() + (certain - target_certain).relu()
