"""Routers by name: modules that decide which experts a token uses, and with which weight."""

from __future__ import annotations

from .backbone import backbone_routing
from .capacity import Capacity, CapacityRouter
from .constant import ConstantRouter
from .dense import Dense, DenseRouter
from .following import FollowingRouter
from .gates import Gate, Softmax
from .linear import LinearRouter
from .registry import (
    DEFAULT_GATE,
    DEFAULT_ROUTER,
    DEFAULT_SCORER,
    GATES,
    ROUTERS,
    SCORERS,
    SELECTORS,
    lets_nothing_pass,
    make_router,
    router_fields,
    router_gives,
    router_learns,
    router_names,
    router_needs,
    router_parts,
)
from .router import Router
from .selector import Selector
from .top_k import TopK, TopKRouter

__all__ = [
    "DEFAULT_GATE",
    "DEFAULT_ROUTER",
    "DEFAULT_SCORER",
    "GATES",
    "ROUTERS",
    "SCORERS",
    "SELECTORS",
    "Capacity",
    "CapacityRouter",
    "ConstantRouter",
    "Dense",
    "DenseRouter",
    "FollowingRouter",
    "Gate",
    "LinearRouter",
    "Router",
    "Selector",
    "Softmax",
    "TopK",
    "TopKRouter",
    "backbone_routing",
    "lets_nothing_pass",
    "make_router",
    "router_fields",
    "router_gives",
    "router_learns",
    "router_names",
    "router_needs",
    "router_parts",
]
