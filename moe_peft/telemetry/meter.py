"""Adds up what the routers of a model decide in training, and reads it once per logging interval.

The routings of a micro-batch are summed in one pass over all places; a reading costs one all-reduce and one copy to
the host, whatever the number of layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean

import torch
from torch.nn import functional as F

from ..forward.processes import num_processes, sum_over_processes
from ..forward.tracker import ForwardTracker
from ..types import Routing
from .stacked import add, as_sums, in_groups, stacked_statistics
from .statistics import RoutingStatistics

Key = tuple[str, str]
# What is logged of a place; the last where it has a capacity.
STATISTICS = ("load_entropy", "max_over_mean_load", "dead_experts", "confidence", "drop_rate")
MAX_WAITING = 2**20  # elements of probabilities


@dataclass(frozen=True)
class Reading:
    """What was measured since the last reading.

    Attributes:
        places: (place, adapter) -> statistics over all tokens of all processes, on the host.
        losses: Loss name -> mean over layers and micro-batches of the unscaled loss.
    """

    places: dict[Key, RoutingStatistics]
    losses: dict[str, float]


class RoutingMeter:
    """Observer of a model's training passes.

    Decisions wait until the micro-batch ends, so that those of all places are summed in one pass; no more of them wait
    than `MAX_WAITING` elements.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[Key, ...], list[torch.Tensor]] = {}
        self.losses: dict[str, torch.Tensor] = {}
        self.micro_batches = 0
        self._waiting: list[tuple[Key, Routing]] = []
        self._elements = 0

    def observe(self, place: str, adapter: str, routing: Routing) -> None:
        """Add a routing; those of evaluation and generation do not count."""
        if not routing.context.training:
            return
        weights, probs = routing.weights.detach(), routing.probs.detach()
        bare = replace(routing, weights=weights, logits=probs, probs=probs, extras={})
        self._waiting.append(((place, adapter), bare))
        self._elements += probs.numel()
        if self._elements > MAX_WAITING:
            self._add_waiting()

    def add_losses(self, *trackers: ForwardTracker) -> None:
        """Add the router losses of the latest training forward, and sum what its places have decided.

        Args:
            *trackers: Those of all adapted models that the forward ran.
        """
        self._add_waiting()
        values: dict[str, list[torch.Tensor]] = {}
        for tracker in trackers:
            for name, value in tracker.latest.mean_values().items() if tracker.latest is not None else ():
                values.setdefault(name, []).append(value)
        for name, parts in values.items():
            value = torch.stack([part.to(parts[0]) for part in parts]).mean()
            self.losses[name] = self.losses[name] + value if name in self.losses else value
        self.micro_batches += any(tracker.latest is not None for tracker in trackers)

    def read(self) -> Reading:
        """Join what all processes measured, and start anew; every process must call it."""
        self._add_waiting()
        rows = self._by_place()
        keys, names = sorted(rows), sorted(self.losses)
        joined = sum_over_processes([rows[key] for key in keys] + [self.losses[name][None] for name in names])
        flat = torch.cat([part.to(joined[0]) for part in joined]).cpu() if joined else torch.zeros(0)
        parts = iter(flat.split([part.numel() for part in joined]))
        places = {key: _unpacked(next(parts)) for key in keys}
        count = max(self.micro_batches, 1) * num_processes()
        losses = {name: float(next(parts)) / count for name in names}
        self.sums, self.losses, self.micro_batches = {}, {}, 0
        return Reading(places, losses)

    def _add_waiting(self) -> None:
        """Sum the decisions that wait, of all places in one pass."""
        keys, routings = [key for key, _ in self._waiting], [routing for _, routing in self._waiting]
        self._waiting, self._elements = [], 0
        for group, members in in_groups(keys, routings):
            own, before = as_sums(stacked_statistics(members)), self.sums.get(group)
            self.sums[group] = own if before is None else add(before, own)

    def _by_place(self) -> dict[Key, torch.Tensor]:
        """The sums of each place side by side; those of several groups, as of batches of other sizes, added up."""
        found: dict[Key, torch.Tensor] = {}
        for group, stacked in self.sums.items():
            packed = torch.cat([part.reshape(len(group), -1) for part in stacked], dim=-1)
            for key, row in zip(group, packed.unbind(), strict=True):
                found[key] = _sum_of(found[key], row) if key in found else row
        return found


def _sum_of(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sum of two rows, one of which may lack the last number."""
    missing = len(one) - len(other)
    return F.pad(one, (0, max(-missing, 0))) + F.pad(other, (0, max(missing, 0)))


def _unpacked(row: torch.Tensor) -> RoutingStatistics:
    """The sums of one place from a row: E requests, E masses, tokens, confidence, with a capacity what was dropped."""
    num_experts, capacity = divmod(len(row) - 2, 2)
    requests, mass, rest = row.split([num_experts, num_experts, 2 + capacity])
    return RoutingStatistics(requests, mass, *rest.unbind())


def metrics_of(reading: Reading, layer_groups: int) -> dict[str, float]:
    """Turn a reading into log entries.

    Args:
        reading: Of a meter.
        layer_groups: Number of groups of consecutive decoder layers that get entries of their own; 0 for none.

    Returns:
        "moe/<loss>", "moe/<statistic>" over all places, and "moe/layers_<first>-<last>/<statistic>".
    """
    values = _by_name(reading.places)
    metrics = {f"moe/{name}": value for name, value in reading.losses.items()}
    metrics.update({f"moe/{name}": value for name, value in _means(list(values.values())).items()})
    for label, members in group_layers([place for place, _ in reading.places], layer_groups).items():
        chosen = [own for (place, _), own in values.items() if place in members]
        metrics.update({f"moe/{label}/{name}": value for name, value in _means(chosen).items()})
    return metrics


def group_layers(places: list[str], count: int) -> dict[str, set[str]]:
    """Split the decoder layers of each stack into groups of consecutive layers.

    Args:
        places: Full names of adapted modules; those that lie in no numbered layer belong to no group.
        count: Number of groups per stack.

    Returns:
        Label -> places; the label names the stack where there are several.
    """
    if count < 1:
        return {}
    stacks: dict[str, dict[int, set[str]]] = {}
    for place in places:
        layer = _layer_of(place)
        if layer is not None:
            stacks.setdefault(layer[0], {}).setdefault(layer[1], set()).add(place)
    groups: dict[str, set[str]] = {}
    for stack, layers in stacks.items():
        numbers = sorted(layers)
        size = -(-len(numbers) // count)
        prefix = f"{stack.replace('.', '_')}_" if len(stacks) > 1 else "layers_"
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            groups[f"{prefix}{part[0]}-{part[-1]}"] = set().union(*(layers[number] for number in part))
    return groups


@lru_cache(maxsize=4096)
def _layer_of(place: str) -> tuple[str, int] | None:
    """The stack and the number of the layer that a place lies in; None for one that lies in none."""
    found = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", place)
    return None if found is None else (found.group(1) or "", int(found.group(2)))


def _by_name(places: Mapping[Key, RoutingStatistics]) -> dict[Key, dict[str, float]]:
    """Each place's statistics by name, computed for all places of as many experts at once."""
    groups: dict[tuple, list[Key]] = {}
    for key, own in places.items():
        groups.setdefault((own.mass.shape, own.mass.dtype, own.dropped is None), []).append(key)
    found: dict[Key, dict[str, float]] = {}
    for keys in groups.values():
        joined = RoutingStatistics.stacked([places[key] for key in keys])
        names = [name for name in STATISTICS if name != "drop_rate" or joined.dropped is not None]
        columns = [getattr(joined, name).tolist() for name in names]
        found |= {
            key: dict(zip(names, row, strict=True)) for key, row in zip(keys, zip(*columns, strict=True), strict=True)
        }
    return {key: found[key] for key in places}


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over places of each statistic, of those places that have it."""
    columns = {name: [row[name] for row in rows if name in row] for name in STATISTICS}
    return {name: fmean(values) for name, values in columns.items() if values}
