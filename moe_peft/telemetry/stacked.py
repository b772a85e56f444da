"""The sums of `RoutingStatistics` for many places in one pass, as they mostly decide about the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch

from ..types import Routing, TokenContext
from .statistics import RoutingStatistics

# Elements of (P * T, E) matrices at a time: what is small is limited by the number of calls, not by memory.
MAX_ELEMENTS = 2**20


def alike(routing: Routing) -> tuple:
    """What routings must have in common for their sums to be computed in one pass: sizes, dtypes, device and mask."""
    experts, dropped, valid = routing.experts, routing.dropped, routing.valid
    tensors = (routing.weights, routing.probs, experts, dropped)
    kinds = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
    return (kinds, routing.num_experts, routing.probs.device, None if valid is None else id(valid))


@torch.no_grad()
def stacked_statistics(routings: Sequence[Routing]) -> RoutingStatistics:
    """Sum over the valid tokens of each of several routings.

    Args:
        routings: P decisions that are `alike`, for T tokens each.

    Returns:
        Sums as of `RoutingStatistics.of`, with a first dimension P.
    """
    first, places = routings[0], len(routings)
    tokens, valid = first.probs.shape[0], first.valid
    joined = Routing(
        weights=torch.cat([routing.weights for routing in routings]),
        experts=_cat([routing.experts for routing in routings]),
        logits=first.logits,
        probs=torch.cat([routing.probs for routing in routings]),
        dropped=_cat([routing.dropped for routing in routings]),
        context=TokenContext(valid=None if valid is None else valid.repeat(places)),
    )

    def sums(values: torch.Tensor) -> torch.Tensor:
        """(P, ...) sums over the valid tokens of (P * T, ...) values."""
        if joined.valid is not None:
            values = values.masked_fill(~joined.valid.view(-1, *[1] * (values.ndim - 1)), 0.0)
        return values.view(places, tokens, *values.shape[1:]).sum(1)

    counted = first.probs.new_tensor(float(tokens)) if valid is None else valid.sum().to(first.probs)
    return RoutingStatistics(
        requests=joined.request_matrix().view(places, tokens, -1).sum(1),
        mass=sums(joined.gate_matrix()).to(first.probs),
        tokens=counted.expand(places),
        confidence_sum=sums(joined.probs.amax(-1)),
        dropped=None if joined.dropped is None else sums(joined.dropped.to(first.probs)).sum(-1),
    )


def as_sums(statistics: RoutingStatistics) -> list[torch.Tensor]:
    """The sums of one place or of several, which add up with those of other batches; the last only with a capacity."""
    values = [getattr(statistics, own.name) for own in fields(statistics)]
    return [value for value in values if value is not None]


def add(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[torch.Tensor]:
    """Add up the sums of two batches, one of which may have had no capacity."""
    longer = max(one, other, key=len)
    return [a + b for a, b in zip(one, other, strict=False)] + longer[min(len(one), len(other)) :]


def in_groups(keys: Sequence, routings: Sequence[Routing]) -> Iterator[tuple[tuple, list[Routing]]]:
    """Group routings that are `alike`, in parts of at most `MAX_ELEMENTS`.

    Args:
        keys: What each routing is the decision of.
        routings: The decisions.

    Yields:
        The keys of a group, and its routings.
    """
    groups: dict[tuple, list[int]] = {}
    for index, routing in enumerate(routings):
        groups.setdefault(alike(routing), []).append(index)
    for members in groups.values():
        size = max(1, MAX_ELEMENTS // max(1, routings[members[0]].probs.numel()))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            yield tuple(keys[index] for index in part), [routings[index] for index in part]


def _cat(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
