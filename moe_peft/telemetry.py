"""What a routing says about the experts: load, importance, entropy, dead experts, drop rate, confidence.

Pure functions of a `Routing`, over its valid tokens, in float32; `record` collects the routings of a model's forwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .context import find_tracker
from .losses.masking import masked_sum, num_valid
from .types import Routing


def load(routing: Routing) -> torch.Tensor:
    """Share of the requests that each expert gets, before any capacity; uniform for a dense router.

    Returns:
        (E,) summing to one.
    """
    requests_E = routing.request_matrix().sum(0)
    return requests_E / requests_E.sum().clamp_min(1)


def importance(routing: Routing) -> torch.Tensor:
    """Share of the gate mass that each expert gets.

    Returns:
        (E,) summing to one.
    """
    mass_E = masked_sum(routing.gate_matrix(), routing)
    return mass_E / mass_E.sum().clamp_min(torch.finfo(mass_E.dtype).tiny)


def load_entropy(routing: Routing) -> torch.Tensor:
    """Entropy of the experts' share of the gate mass over its maximum log E: one when even, zero when collapsed.

    Returns:
        0-d tensor; one for a single expert.
    """
    share_E = importance(routing)
    if share_E.numel() == 1:
        return torch.ones_like(share_E[0])
    return torch.special.entr(share_E).sum() / torch.log(torch.tensor(float(share_E.numel())))


def max_over_mean_load(routing: Routing) -> torch.Tensor:
    """Largest share of the requests over the even share; one when balanced, E when collapsed.

    Returns:
        0-d tensor.
    """
    share_E = load(routing)
    return share_E.max() * share_E.numel()


def dead_experts(routing: Routing) -> torch.Tensor:
    """Number of experts that no valid token asked for.

    Returns:
        0-d int64 tensor.
    """
    return (routing.request_matrix().sum(0) == 0).sum()


def drop_rate(routing: Routing) -> torch.Tensor:
    """Share of the valid tokens' requests that found their expert full.

    Returns:
        0-d tensor; zero without a capacity.
    """
    if routing.dropped is None:
        return routing.logits.new_zeros(())
    requests = routing.request_matrix().sum().clamp_min(1)
    return masked_sum(routing.dropped.to(requests.dtype), routing).sum() / requests


def confidence(routing: Routing) -> torch.Tensor:
    """Mean over the valid tokens of the largest gate probability.

    Returns:
        0-d tensor in [1 / E, 1].
    """
    return masked_sum(routing.probs.amax(-1), routing) / num_valid(routing).clamp_min(1)


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Collect every routing of the model's forwards, in training and evaluation.

    Args:
        model: A model with routed adapters, wrapped or not.

    Yields:
        Place -> routings in the order in which they were made, of all active adapters. They keep their graph; use
        `torch.no_grad` or detach what is kept.

    Raises:
        ValueError: The model has no routed adapter.
    """
    tracker = find_tracker(model)
    if tracker is None:
        raise ValueError(f"{type(model).__name__} has no routed adapter. Add one with peft.get_peft_model.")
    routings: dict[str, list[Routing]] = {}

    def observe(place: str, adapter: str, routing: Routing) -> None:
        routings.setdefault(place, []).append(routing)

    tracker.observers.append(observe)
    try:
        yield routings
    finally:
        tracker.observers.remove(observe)
