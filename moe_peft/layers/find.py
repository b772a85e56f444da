"""The layers of a model that hold routed adapters, for programs that read or steer their parts."""

from __future__ import annotations

from torch import nn

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
