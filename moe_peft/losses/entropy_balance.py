"""Entropy balance: sum_e q_e log q_e, q_e the mean over valid tokens of p_e over their sum.

Sigma-MoE (Csordas et al., arXiv 2310.10837). The negative entropy of how the experts are used in the mean: it is
least, -log E, where all are used alike, and says nothing of single tokens.
"""

from __future__ import annotations

import torch

from ..types import RouterLoss, Routing
from .entropy import entropy
from .masking import masked_sum, shares


class EntropyBalance(RouterLoss):
    """Evens out the experts' mean probability, of dense and sparse decisions."""

    def stacks_by(self) -> tuple[()]:
        """Any; see `RouterLoss.stacks_by`."""
        return ()

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., E) summed probability of each expert."""
        return masked_sum(routing.probs, routing)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., E) sums; zero where there are none."""
        return -entropy(shares(sums))
