"""Experts by name: banks of parameters of which a token uses some."""

from __future__ import annotations

from ..registries import Registry
from .bottleneck import BottleneckExperts
from .cartesian import CartesianExperts
from .cp_diagonal import CpDiagonalExperts
from .experts import Experts, PendingRouting
from .ffn_lora import FfnLoraExperts
from .film import FilmExperts
from .goat import GoatExperts
from .latent_core import LatentCoreExperts
from .low_rank import LowRankExperts
from .normalized import NormalizedExperts
from .selection import Selection
from .shared_down import SharedDownExperts
from .slices import ExpertSlices
from .sparse_down import SparseDownExperts
from .vector import VectorExperts
from .zero_computation import ZeroComputationExperts

EXPERTS: dict[str, type[Experts]] = Registry(
    "EXPERTS",
    Experts,
    {
        "low_rank": LowRankExperts,
        "bottleneck": BottleneckExperts,
        "shared_down": SharedDownExperts,
        "cp_diagonal": CpDiagonalExperts,
        "latent_core": LatentCoreExperts,
        "normed": NormalizedExperts,
        "ffn_lora": FfnLoraExperts,
        "film": FilmExperts,
        "zero_computation": ZeroComputationExperts,
        "goat": GoatExperts,
        "sparse_down": SparseDownExperts,
        "cartesian": CartesianExperts,
    },
)
# The kind of configurations that name none.
DEFAULT_EXPERTS = "low_rank"

__all__ = [
    "DEFAULT_EXPERTS",
    "EXPERTS",
    "BottleneckExperts",
    "ExpertSlices",
    "Experts",
    "LowRankExperts",
    "PendingRouting",
    "Selection",
    "VectorExperts",
]
