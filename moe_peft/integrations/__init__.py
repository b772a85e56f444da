"""Callbacks and collators for trainers; the only part of the package that may import trl."""

from __future__ import annotations

from .adaptive import AdaptiveCoefficients
from .attach import attach
from .callback import MoeCallback
from .collator import GroupCollator
from .consistency import consistent, consistent_loss, twice
from .ewc import EwcCallback, Fisher, fisher_information
from .freezing import FreezeCallback
from .scheduled_value import ScheduledValue
from .schedules import CoefficientSchedule

__all__ = [
    "AdaptiveCoefficients",
    "CoefficientSchedule",
    "EwcCallback",
    "Fisher",
    "FreezeCallback",
    "GroupCollator",
    "MoeCallback",
    "ScheduledValue",
    "attach",
    "consistent",
    "consistent_loss",
    "fisher_information",
    "twice",
]
