"""Tuner layers: the life of adapters on one wrapped module (add, switch, disable, merge), without any maths.

`LAYERS` has the layer of each kind of placement, by the name that configurations carry in `placement`.
"""

from __future__ import annotations

from .routed_layer import RoutedLayer
from .routed_linear import RoutedLinear

LAYERS: dict[str, type[RoutedLinear]] = {"linear": RoutedLinear}

__all__ = ["LAYERS", "RoutedLayer", "RoutedLinear"]
