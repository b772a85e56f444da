"""Routers by name: modules that decide which experts a token uses, and with which weight."""

from __future__ import annotations

from .backbone import backbone_routing
from .capacity import CapacityRouter
from .constant import ConstantRouter
from .dense import DenseRouter
from .router import LinearRouter, Router
from .top_k import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "dense": DenseRouter,
    "top_k": TopKRouter,
    "capacity": CapacityRouter,
    "constant": ConstantRouter,
}

__all__ = [
    "ROUTERS",
    "CapacityRouter",
    "ConstantRouter",
    "DenseRouter",
    "LinearRouter",
    "Router",
    "TopKRouter",
    "backbone_routing",
]
