"""Adapter types: one paper per file, each a choice of router, experts and losses."""

from __future__ import annotations

from ..config.config import MoeConfig
from ..registries import Registry
from .esft import EsftConfig
from .expert_lora import ExpertLoraConfig
from .loramoe import LoraMoeConfig
from .molora import MoloraConfig
from .mov import MovConfig
from .perft import PerftConfig
from .routed import RoutedConfig
from .sira import SiraConfig

METHODS: dict[str, type[MoeConfig]] = Registry(
    "METHODS",
    MoeConfig,
    {
        "loramoe": LoraMoeConfig,
        "molora": MoloraConfig,
        "sira": SiraConfig,
        "mov": MovConfig,
        "perft": PerftConfig,
        "esft": EsftConfig,
        "expert_lora": ExpertLoraConfig,
        "routed": RoutedConfig,
    },
)

__all__ = [
    "METHODS",
    "EsftConfig",
    "ExpertLoraConfig",
    "LoraMoeConfig",
    "MoloraConfig",
    "MovConfig",
    "PerftConfig",
    "RoutedConfig",
    "SiraConfig",
]
