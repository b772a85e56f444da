"""A report as JSON holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .groups import shares_by_group
from .measure import PlaceRouting
from .measures import divergence, effective_experts, known_mean, relative_entropy
from .sentences import Sentence

DIGITS = 6
LARGEST_MATRIX = 32  # experts whose similarities are written one by one


def of_place(own: PlaceRouting, groups: Sequence[str]) -> dict[str, Any]:
    """The numbers of one place.

    Args:
        own: What was decided there.
        groups: Names of the groups.
    """
    total = own.total
    by_group = {group: found for group in groups if (found := own.statistics(group)) is not None}
    return {
        "place": own.place,
        "adapter": own.adapter,
        "layer": own.layer,
        "decides": own.decides,
        "dense": own.dense,
        "num_experts": own.num_experts,
        "experts_per_token": own.experts_per_token,
        "load": total.load.tolist(),
        "importance": total.importance.tolist(),
        "load_entropy": relative_entropy(total.importance),
        "entropy_of_tokens": own.token_entropy,
        "effective_experts": effective_experts(total.importance),
        "max_over_mean_load": float(total.max_over_mean_load),
        "confidence": float(total.confidence),
        "drop_rate": float(total.drop_rate),
        "dead_experts": int(total.dead_experts),
        "importance_by_group": {group: found.importance.tolist() for group, found in by_group.items()},
        "divergence": divergence(shares_by_group(own, groups)),
    }


def of_sentence(own: Sentence) -> dict[str, Any]:
    """A text, and the expert of the largest weight of each token by place."""
    experts = {place: weights.argmax(-1).tolist() for (place, _), weights in own.weights.items()}
    return {"group": own.group, "tokens": own.tokens, "experts": experts}


def of_cosines(matrix: torch.Tensor) -> dict[str, Any]:
    """Mean and largest of the pairs, and all of them where the experts are few.

    Args:
        matrix: (E, E) cosines.
    """
    pairs = matrix[torch.ones_like(matrix, dtype=torch.bool).triu(1)].tolist()
    largest = max((value for value in pairs if value == value), default=math.nan)
    summary: dict[str, Any] = {"mean": known_mean(pairs), "largest": largest}
    return summary if len(matrix) > LARGEST_MATRIX else {**summary, "cosines": matrix.tolist()}


def rounded(value: Any) -> Any:
    """Numbers to a few digits, and null for what is not known, as JSON has no NaN.

    Args:
        value: A number, a text, or mappings and lists of them.
    """
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(own) for key, own in value.items()}
    return [rounded(own) for own in value] if isinstance(value, (list, tuple)) else value
