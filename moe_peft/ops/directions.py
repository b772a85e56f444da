"""Vectors over their length, x / |x|, with a finite gradient where a vector is zero, as padding may be."""

from __future__ import annotations

import torch

# Below this length a vector has no direction: the gradient of one, which is its inverse, would drown all others.
SHORTEST = 1e-6


def directions(x: torch.Tensor) -> torch.Tensor:
    """Bring vectors to a length of one.

    Args:
        x: (..., D).

    Returns:
        (..., D); vectors shorter than `SHORTEST` stay as they are.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length < SHORTEST, 1.0, length)
