"""Importance: squared coefficient of variation of the experts' summed weights (arXiv 1701.06538, eq. 6-7).

I_e = sum over valid tokens of w_e,   loss = var(I) / mean(I)^2       population variance
"""

from __future__ import annotations

import torch

from ..types import RouterLoss, Routing
from .masking import masked_sum


class Importance(RouterLoss):
    """Evens out the experts' gate mass, of dense and sparse decisions.

    Zero when all experts have the same mass and E - 1 when one has all of it.
    """

    def stacks_by(self) -> tuple[()]:
        """Any; see `RouterLoss.stacks_by`."""
        return ()

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., E) gate mass of each expert."""
        return masked_sum(routing.gate_matrix(), routing)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., E) masses."""
        mean = sums.mean(-1)
        return (sums - mean[..., None]).square().mean(-1) / (mean.square() + 1e-10)


importance = Importance()
