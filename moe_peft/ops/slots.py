"""Decisions slot by slot: what ops that skip work read instead of one column per expert."""

from __future__ import annotations

import torch

from ..types import Routing


def slots_of(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts and weights of each token's slots; a slot without an expert has some expert and the weight zero.

    Args:
        routing: A decision; a dense one has a slot for each expert.

    Returns:
        (T, K) int64 below E, and (T, K) weights.
    """
    if routing.experts is None:
        every_E = torch.arange(routing.num_experts, device=routing.weights.device)
        return every_E.expand_as(routing.weights), routing.weights
    empty_TK = routing.experts >= routing.num_experts
    return routing.experts.clamp(max=routing.num_experts - 1), routing.weights.masked_fill(empty_TK, 0.0)
