"""Callbacks and collators for trainers; the only part of the package that may import trl."""

from __future__ import annotations

from .attach import attach
from .callback import MoeCallback
from .collator import GroupCollator

__all__ = ["GroupCollator", "MoeCallback", "attach"]
