"""What a routing says about the experts: load, importance, entropy, dead experts, drop rate, confidence.

Pure functions of a `Routing`, over its valid tokens, without gradient; `record` collects the routings of a model's
forwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..forward.find import find_trackers
from ..types import Routing
from .statistics import RoutingStatistics


def load(routing: Routing) -> torch.Tensor:
    """Share of the requests that each expert gets, before any capacity; uniform for a dense router.

    Returns:
        (E,) summing to one.
    """
    return RoutingStatistics.of(routing).load


def importance(routing: Routing) -> torch.Tensor:
    """Share of the gate mass that each expert gets.

    Returns:
        (E,) summing to one.
    """
    return RoutingStatistics.of(routing).importance


def load_entropy(routing: Routing) -> torch.Tensor:
    """Entropy of the experts' share of the gate mass over its maximum log E: one when even, zero when collapsed.

    Returns:
        0-d tensor; one for a single expert.
    """
    return RoutingStatistics.of(routing).load_entropy


def max_over_mean_load(routing: Routing) -> torch.Tensor:
    """Largest share of the requests over the even share; one when balanced, E when collapsed.

    Returns:
        0-d tensor.
    """
    return RoutingStatistics.of(routing).max_over_mean_load


def dead_experts(routing: Routing) -> torch.Tensor:
    """Number of experts that no valid token asked for.

    Returns:
        0-d int64 tensor.
    """
    return RoutingStatistics.of(routing).dead_experts


def drop_rate(routing: Routing) -> torch.Tensor:
    """Share of the valid tokens' requests that found their expert full.

    Returns:
        0-d tensor; zero without a capacity.
    """
    return RoutingStatistics.of(routing).drop_rate


def confidence(routing: Routing) -> torch.Tensor:
    """Mean over the valid tokens of the largest gate probability.

    Returns:
        0-d tensor in [1 / E, 1].
    """
    return RoutingStatistics.of(routing).confidence


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Collect every routing of the model's forwards in this thread, in training and evaluation.

    Args:
        model: A model with routed adapters, wrapped or not.

    Yields:
        Place -> routings in the order in which they were made, of all active adapters. They keep their graph; use
        `torch.no_grad` or detach what is kept.

    Raises:
        TypeError: The model is no module.
        ValueError: The model has no routed adapter.
    """
    trackers = find_trackers(model)
    if not trackers:
        raise ValueError(f"{type(model).__name__} has no routed adapter. Add one with peft.get_peft_model.")
    routings: dict[str, list[Routing]] = {}

    def observe(place: str, adapter: str, routing: Routing) -> None:
        routings.setdefault(place, []).append(routing)

    for tracker in trackers:
        tracker.observers.append(observe)
    try:
        yield routings
    finally:
        for tracker in trackers:
            tracker.observers.remove(observe)
