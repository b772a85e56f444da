"""What parts change after each optimizer step: balancing biases, coefficients that follow the routing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..forward.find import find_trackers
from ..forward.processes import num_processes, sum_over_processes
from ..forward.tracker import ForwardTracker
from ..telemetry.statistics import RoutingStatistics
from .routed_layer import RoutedLayer

Key = tuple[str, str]


@torch.no_grad()
def after_step(model: nn.Module) -> None:
    """Let the parts of all adapters change by what their routers decided since the last call.

    Trainers' callbacks call it; a plain loop calls it after `optimizer.step()`, on every process. The decisions of all
    processes are joined, also where a process has not called a layer that another has. Selectors that count change
    their own tensors, layer by layer; losses that adapt get a new coefficient, one for all places of an adapter.
    Nothing happens where no part asks.

    Args:
        model: A model with routed adapters, wrapped or not.

    Raises:
        TypeError: The model is no module.
    """
    for tracker in find_trackers(model):
        layers = [m for m in model.modules() if isinstance(m, RoutedLayer) and m.tracker is tracker]
        asking = {(m.place, name): m for m in layers for name in m.objectives if m.counts_decisions(name)}
        statistics = _take(tracker, asking)
        counted = {key: layer for key, layer in asking.items() if key in statistics}
        for (place, adapter), layer in counted.items():
            if adapter in layer.router:
                layer.router[adapter].after_step(statistics[place, adapter])
        for adapter in sorted({adapter for _, adapter in counted}):
            _adapt({key[0]: layer for key, layer in counted.items() if key[1] == adapter}, adapter, statistics)


def _take(tracker: ForwardTracker, asking: Mapping[Key, RoutedLayer]) -> dict[Key, RoutingStatistics]:
    """The statistics of all processes since the last call.

    A process may have called layers that another has not, as those of an encoder whose images came to one alone. So
    every layer that asks has its place in what is summed, in the model's order, and the sizes are told first.

    Args:
        tracker: Its counts of this process end here.
        asking: The layers that change by what is decided, the same on every process.
    """
    counted, tracker.counted = tracker.counted, {}
    own = {key: RoutingStatistics(*counted[key]) for key in asking if key in counted}
    if num_processes() == 1 or not asking:
        return own
    device = next(next(iter(asking.values())).parameters()).device
    told = [(1.0, len(own[k].requests), own[k].dropped is not None) if k in own else (0.0, 0.0, 0.0) for k in asking]
    (joined,) = sum_over_processes([torch.tensor(told, device=device).view(-1)])
    sizes = {
        key: (int(experts / seen), capacity > 0)
        for key, (seen, experts, capacity) in zip(asking, joined.view(-1, 3).tolist(), strict=True)
        if seen > 0
    }
    sums = sum_over_processes([_flat(own.get(key), experts, device) for key, (experts, _) in sizes.items()])
    return {key: _statistics(flat, *size) for flat, (key, size) in zip(sums, sizes.items(), strict=True)}


def _flat(statistics: RoutingStatistics | None, num_experts: int, device: torch.device) -> torch.Tensor:
    """(2E + 3,) sums of a place in one vector, zeros where this process has not called it."""
    if statistics is None:
        return torch.zeros(2 * num_experts + 3, device=device)
    dropped = statistics.tokens.new_zeros(()) if statistics.dropped is None else statistics.dropped
    single = (statistics.tokens, statistics.confidence_sum, dropped)
    like = statistics.mass
    return torch.cat([statistics.requests.to(like), like, *(own.to(like).view(1) for own in single)])


def _statistics(flat: torch.Tensor, num_experts: int, has_capacity: bool) -> RoutingStatistics:
    """The sums of a place again."""
    requests, mass, single = flat.split([num_experts, num_experts, 3])
    return RoutingStatistics(requests, mass, single[0], single[1], single[2] if has_capacity else None)


def _adapt(layers: dict[str, RoutedLayer], adapter: str, statistics: dict[Key, RoutingStatistics]) -> None:
    """Give each adapting loss of an adapter its next coefficient, the same at all places."""
    with_loss: dict[str, list[str]] = {}
    for place, layer in layers.items():
        for name, loss in layer.objectives[adapter].losses.items():
            if loss.adapts:
                with_loss.setdefault(name, []).append(place)
    for name, places in with_loss.items():
        first = layers[places[0]].objectives[adapter]
        seen = [statistics[place, adapter] for place in places]
        coefficient = float(first.losses[name].adapt(first.coefficients[name], seen))
        for place in places:
            layers[place].objectives[adapter].coefficients[name] = coefficient
