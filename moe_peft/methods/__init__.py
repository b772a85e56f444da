"""Adapter types: one paper per file, each a choice of router, experts and losses."""

from __future__ import annotations

from .loramoe import LoraMoeConfig
from .molora import MoloraConfig
from .routed import RoutedConfig
from .sira import SiraConfig

METHODS = {"loramoe": LoraMoeConfig, "molora": MoloraConfig, "sira": SiraConfig, "routed": RoutedConfig}

__all__ = ["METHODS", "LoraMoeConfig", "MoloraConfig", "RoutedConfig", "SiraConfig"]
