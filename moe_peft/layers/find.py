"""The layers of a model that hold routed adapters, for programs that read or steer their parts."""

from __future__ import annotations

from torch import nn

from ..forward.tracker import ForwardTracker
from ..messages import shown
from .routed_layer import RoutedLayer


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """The layers with routed adapters, in the order of the model's modules.

    A layer knows its `place`, and by adapter name its `router`, `experts` and `objectives`, whose `coefficients` are
    the weights of the router losses.

    Args:
        model: Any model, wrapped or not.

    Raises:
        TypeError: It is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"routed_layers: model={shown(model)} is no model. Give a torch.nn.Module with adapters.")
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


def joined_places(model: nn.Module, tracker: ForwardTracker) -> dict[tuple[str, str], bool]:
    """The places whose router losses a forward may join with those of other processes.

    Args:
        model: The module that is called.
        tracker: Whose places; a tree of modules may have several.

    Returns:
        (place, adapter) -> whether it may be called more than once in a forward, as an encoder for images and videos;
        of active adapters, or of all where rows of a batch name theirs.
    """
    layers = [layer for layer in routed_layers(model) if layer.tracker is tracker]
    return {
        (layer.place, name): layer.rows == "media"
        for layer in layers
        if layer.rows != "positions"
        for name in (layer.experts if tracker.mixes_rows() else layer.active_adapters)
        if name in layer.objectives and layer.objectives[name] and layer.objectives[name].scope != "micro_batch"
    }
