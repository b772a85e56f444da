"""Tuner layers: the life of adapters on one wrapped module (add, switch, disable, merge), without any maths.

`LAYERS` has the layer of each kind of placement, by the name that configurations carry in `placement`.
"""

from __future__ import annotations

from .adapted_experts import AdaptedExperts
from .find import joined_places, routed_layers
from .routed_block import RoutedBlock
from .routed_experts import RoutedExperts
from .routed_ffn import RoutedFfn
from .routed_layer import RoutedLayer
from .routed_linear import RoutedLinear
from .scaled_linear import ScaledLinear
from .sliced_experts import SlicedExperts

LAYERS: dict[str, type[RoutedLayer]] = {
    "linear": RoutedLinear,
    "scaled": ScaledLinear,
    "block": RoutedBlock,
    "ffn": RoutedFfn,
    "experts": RoutedExperts,
    "slices": SlicedExperts,
    "matrices": AdaptedExperts,
}

__all__ = [
    "LAYERS",
    "AdaptedExperts",
    "RoutedBlock",
    "RoutedExperts",
    "RoutedFfn",
    "RoutedLayer",
    "RoutedLinear",
    "ScaledLinear",
    "SlicedExperts",
    "joined_places",
    "routed_layers",
]
