"""What a part or a method outside of this package imports: base classes, contracts, registries, registration.

A part is a class in a file of your own and one line that puts it into a registry:

    from moe_peft.extend import GATES, Gate

    class Sigmoid(Gate):
        def __call__(self, logits_TE, context):
            return logits_TE.sigmoid()

    GATES["my_sigmoid"] = Sigmoid

A program that loads an adapter of such parts must import that file first.
"""

from __future__ import annotations

from .config.config import MoeConfig
from .config.fields import MixtureConfig, PlacingConfig, RoutedMoeConfig, RouterLossConfig
from .config.pair_fields import LowRankConfig
from .config.parts import RoutedParts
from .config.router_fields import CapacityConfig, RouterConfig, TopKConfig
from .experts import EXPERTS, Experts, LowRankExperts, PendingRouting
from .forward.objective import RouterObjective
from .layers import RoutedLayer, routed_layers
from .losses import LOSSES
from .losses.masking import masked_sum, num_valid
from .methods import METHODS
from .methods.build import build_experts, build_parts, build_router
from .ops import combine_experts, project
from .options import check_options
from .part import Option, Part
from .place import Place
from .routers import (
    GATES,
    ROUTERS,
    SCORERS,
    SELECTORS,
    Capacity,
    ConstantRouter,
    Dense,
    Gate,
    LinearRouter,
    Router,
    Selector,
    Softmax,
    TopK,
    backbone_routing,
)
from .telemetry.statistics import RoutingStatistics
from .tuner.registration import extend_peft_type, register
from .tuner.tuner import RoutedTuner
from .types import RouterLoss, Routing, TokenContext

__all__ = [
    "EXPERTS",
    "GATES",
    "LOSSES",
    "METHODS",
    "ROUTERS",
    "SCORERS",
    "SELECTORS",
    "Capacity",
    "CapacityConfig",
    "ConstantRouter",
    "Dense",
    "Experts",
    "Gate",
    "LinearRouter",
    "LowRankConfig",
    "LowRankExperts",
    "MixtureConfig",
    "MoeConfig",
    "Option",
    "Part",
    "PendingRouting",
    "Place",
    "PlacingConfig",
    "RoutedLayer",
    "RoutedMoeConfig",
    "RoutedParts",
    "RoutedTuner",
    "Router",
    "RouterConfig",
    "RouterLoss",
    "RouterLossConfig",
    "RouterObjective",
    "Routing",
    "RoutingStatistics",
    "Selector",
    "Softmax",
    "TokenContext",
    "TopK",
    "TopKConfig",
    "backbone_routing",
    "build_experts",
    "build_parts",
    "build_router",
    "check_options",
    "combine_experts",
    "extend_peft_type",
    "masked_sum",
    "num_valid",
    "project",
    "register",
    "routed_layers",
]
