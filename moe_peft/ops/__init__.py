"""Ways to compute the routed sum of low-rank experts.

`eager` is the definition, `dense` the default: literal names of the config field `experts_implementation`.
"""

from __future__ import annotations

from collections.abc import Callable

from .dense import combine_experts, dense_experts, project
from .dtypes import cast_to_compute_dtype, without_rounding
from .eager import eager_experts

IMPLEMENTATIONS: dict[str, Callable] = {"eager": eager_experts, "dense": dense_experts}

__all__ = [
    "IMPLEMENTATIONS",
    "cast_to_compute_dtype",
    "combine_experts",
    "dense_experts",
    "eager_experts",
    "project",
    "without_rounding",
]
