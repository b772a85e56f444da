"""Importance: squared coefficient of variation of the experts' summed weights (arXiv 1701.06538, eq. 6-7).

I_e = sum over valid tokens of w_e,   loss = var(I) / mean(I)^2       population variance
"""

from __future__ import annotations

import torch

from ..types import Routing
from .masking import masked_sum


def importance(routing: Routing) -> torch.Tensor:
    """Even out the experts' gate mass; works for dense and sparse decisions.

    Args:
        routing: Any decision.

    Returns:
        0-d loss, zero when all experts have the same mass and E - 1 when one has all of it.
    """
    importance_E = masked_sum(routing.gate_matrix(), routing)
    mean = importance_E.mean()
    return (importance_E - mean).square().mean() / (mean.square() + 1e-10)
