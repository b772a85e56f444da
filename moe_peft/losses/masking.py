"""Sums and counts over the valid tokens of a routing."""

from __future__ import annotations

import torch

from ..types import Routing


def num_valid(routing: Routing) -> torch.Tensor:
    """Number of valid tokens, a 0-d tensor; divide by `num_valid(routing).clamp_min(1)`."""
    if routing.valid is None:
        return routing.logits.new_tensor(float(routing.logits.shape[0]))
    return routing.valid.sum().to(routing.logits.dtype)


def masked_sum(values: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sum over the valid tokens.

    Args:
        values: (T, ...) one row per token.
        routing: Whose padding to leave out.

    Returns:
        (...) sum over T; padding adds nothing, even where it is not finite.
    """
    if routing.valid is not None:
        keep = routing.valid.view(-1, *[1] * (values.ndim - 1))
        values = values.masked_fill(~keep, 0.0)
    return values.sum(0)
