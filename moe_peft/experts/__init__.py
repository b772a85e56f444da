"""Experts by name: banks of parameters of which a token uses some."""

from __future__ import annotations

from .bottleneck import BottleneckExperts
from .experts import Experts, PendingRouting
from .low_rank import LowRankExperts
from .selection import Selection
from .slices import ExpertSlices
from .vector import VectorExperts

EXPERTS: dict[str, type[Experts]] = {"low_rank": LowRankExperts, "bottleneck": BottleneckExperts}

__all__ = [
    "EXPERTS",
    "BottleneckExperts",
    "ExpertSlices",
    "Experts",
    "LowRankExperts",
    "PendingRouting",
    "Selection",
    "VectorExperts",
]
