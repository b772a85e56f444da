"""Router z-loss: mean over valid tokens of logsumexp(z)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""

from __future__ import annotations

import torch

from ..types import Routing
from .masking import masked_sum, num_valid


def z_loss(routing: Routing) -> torch.Tensor:
    """Keep the router logits small.

    Args:
        routing: Any decision.

    Returns:
        0-d loss, zero when every token's logits have a log-sum-exp of zero.
    """
    return masked_sum(routing.logits.logsumexp(dim=-1).square(), routing) / num_valid(routing)
