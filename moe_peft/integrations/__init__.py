"""Callbacks and collators for trainers; the only part of the package that may import trl."""

from __future__ import annotations

from .attach import attach
from .callback import MoeCallback
from .collator import GroupCollator
from .freezing import FreezeCallback
from .schedules import CoefficientSchedule

__all__ = ["CoefficientSchedule", "FreezeCallback", "GroupCollator", "MoeCallback", "attach"]
