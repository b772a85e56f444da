"""Ways to compute the routed sum of low-rank experts.

Literal names of the config field `experts_implementation`: `eager` is the definition, `dense` two GEMMs over all
experts, `grouped`, `segment` and `gather` skip the experts that a token does not use; `auto` chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable

from .choice import AUTO, Work, choose, few_stay_dense, joins
from .dense import add_gated, combine_experts, dense_experts
from .directions import directions
from .dtypes import (
    autocast_is_off,
    autocast_is_on,
    cast_to_compute_dtype,
    compute_dtype,
    outside_autocast,
    without_rounding,
)
from .eager import eager_experts
from .gather import gather_experts
from .mean_softplus import mean_softplus
from .one_hot import one_hot
from .pairs import divisor_below_root
from .project import keeps_a_graph, project, worth_a_function
from .sorted_slots import grouped_experts, segment_experts

IMPLEMENTATIONS: dict[str, Callable] = {
    "eager": eager_experts,
    "dense": dense_experts,
    "grouped": grouped_experts,
    "segment": segment_experts,
    "gather": gather_experts,
}

__all__ = [
    "AUTO",
    "IMPLEMENTATIONS",
    "Work",
    "add_gated",
    "autocast_is_off",
    "autocast_is_on",
    "cast_to_compute_dtype",
    "choose",
    "combine_experts",
    "compute_dtype",
    "dense_experts",
    "directions",
    "divisor_below_root",
    "eager_experts",
    "few_stay_dense",
    "gather_experts",
    "grouped_experts",
    "joins",
    "keeps_a_graph",
    "mean_softplus",
    "one_hot",
    "outside_autocast",
    "project",
    "segment_experts",
    "without_rounding",
    "worth_a_function",
]
