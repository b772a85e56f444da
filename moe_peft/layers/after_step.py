"""What parts change after each optimizer step: balancing biases, coefficients that follow the routing."""

from __future__ import annotations

import torch
from torch import nn

from ..forward.find import find_trackers
from ..forward.processes import sum_over_processes
from ..forward.tracker import ForwardTracker
from ..telemetry.statistics import RoutingStatistics
from .routed_layer import RoutedLayer

Key = tuple[str, str]


@torch.no_grad()
def after_step(model: nn.Module) -> None:
    """Let the parts of all adapters change by what their routers decided since the last call.

    Trainers' callbacks call it; a plain loop calls it after `optimizer.step()`, on every process. The decisions of all
    processes are joined in one all-reduce. Selectors that count change their own tensors, layer by layer; losses that
    adapt get a new coefficient, one for all places of an adapter. Nothing happens where no part asks.

    Args:
        model: A model with routed adapters, wrapped or not.

    Raises:
        TypeError: The model is no module.
    """
    for tracker in find_trackers(model):
        statistics = _take(tracker)
        if not statistics:
            continue
        layers = [m for m in model.modules() if isinstance(m, RoutedLayer) and m.tracker is tracker]
        counted = {key: layer for layer in layers for key in statistics if key[0] == layer.place}
        counted = {key: layer for key, layer in counted.items() if key[1] in layer.objectives}
        for (place, adapter), layer in counted.items():
            if adapter in layer.router:
                layer.router[adapter].after_step(statistics[place, adapter])
        for adapter in sorted({adapter for _, adapter in counted}):
            _adapt({key[0]: layer for key, layer in counted.items() if key[1] == adapter}, adapter, statistics)


def _take(tracker: ForwardTracker) -> dict[Key, RoutingStatistics]:
    """The statistics of all processes since the last call."""
    counted, tracker.counted = tracker.counted, {}
    keys = sorted(counted)
    joined = iter(sum_over_processes([part.reshape(-1) for key in keys for part in counted[key]]))
    return {key: RoutingStatistics(*(next(joined).view_as(own) for own in counted[key])) for key in keys}


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
