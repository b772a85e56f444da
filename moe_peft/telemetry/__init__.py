"""What routings say about the experts: functions of one `Routing`, and what `record` collects over a model."""

from __future__ import annotations

from .functions import (
    confidence,
    dead_experts,
    drop_rate,
    importance,
    load,
    load_entropy,
    max_over_mean_load,
    record,
)

__all__ = [
    "confidence",
    "dead_experts",
    "drop_rate",
    "importance",
    "load",
    "load_entropy",
    "max_over_mean_load",
    "record",
]
