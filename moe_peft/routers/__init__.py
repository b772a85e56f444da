"""Routers by name: modules that decide which experts a token uses, and with which weight."""

from __future__ import annotations

from .capacity import CapacityRouter
from .dense import DenseRouter
from .router import Router
from .top_k import TopKRouter

ROUTERS: dict[str, type[Router]] = {"dense": DenseRouter, "top_k": TopKRouter, "capacity": CapacityRouter}

__all__ = ["ROUTERS", "CapacityRouter", "DenseRouter", "Router", "TopKRouter"]
