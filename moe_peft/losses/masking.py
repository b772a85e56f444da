"""Sums and counts over the valid tokens of a routing."""

from __future__ import annotations

import torch

from ..types import Routing


def num_valid(routing: Routing) -> torch.Tensor:
    """Number of valid tokens, a 0-d tensor; divide by `num_valid(routing).clamp_min(1)`."""
    logits, valid = routing.one.logits, routing.valid
    if valid is None:
        return torch.full((), logits.shape[0], dtype=logits.dtype, device=logits.device)
    return valid.sum().to(logits.dtype)


def masked_sum(values: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sum over the valid tokens.

    Args:
        values: (T, ...) one row per token, or (P, T, ...) where the routing stacks P places.
        routing: Whose padding to leave out.

    Returns:
        (...) or (P, ...) sum over T; padding adds nothing, even where it is not finite.
    """
    if routing.valid is not None:
        keep = routing.valid.view(-1, *[1] * (values.ndim - 1 - routing.token_dim))
        values = values.masked_fill(~keep, 0.0)
    return values.sum(routing.token_dim)


def shares(values: torch.Tensor) -> torch.Tensor:
    """Values over their sum.

    Where gates close all experts, or null experts have all the mass, the sum is so near to zero that its inverse has
    no finite gradient: below the rounding of one, 2^-23 in float32, the values stay as small as they are.

    Args:
        values: (..., E), none negative.

    Returns:
        (..., E) that sum to one; nearly zeros where there is nothing to share.
    """
    return values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
