"""Token entropy: mean over valid tokens of H(p), which keeps decisions sharp (Huang et al., arXiv 2403.07652).

With experts kept by the mass of their probabilities, flat probabilities mean many experts; the loss keeps them few.
"""

from __future__ import annotations

import torch

from ..types import RouterLoss, Routing
from .entropy import entropy
from .masking import masked_sum, num_valid


class TokenEntropy(RouterLoss):
    """Zero where every token is sure of one expert, and log E where none prefers any."""

    def stacks_by(self) -> tuple[()]:
        """Any; see `RouterLoss.stacks_by`."""
        return ()

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., 2) sum of the entropies, and the number of valid tokens."""
        entropies = masked_sum(entropy(routing.probs), routing)
        return torch.stack([entropies, num_valid(routing).expand_as(entropies)], dim=-1)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., 2) sums."""
        return sums[..., 0] / sums[..., 1].clamp_min(1)
