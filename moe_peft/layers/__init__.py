"""Tuner layers: the life of adapters on one wrapped module (add, switch, disable, merge), without any maths."""

from __future__ import annotations

from .routed_layer import RoutedLayer
from .routed_linear import RoutedLinear

__all__ = ["RoutedLayer", "RoutedLinear"]
