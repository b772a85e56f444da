"""An adapter's life in peft: its registration, its tuner, and what is refused before a model is changed."""

from __future__ import annotations

from .registration import extend_peft_type, register
from .tuner import RoutedTuner

__all__ = ["RoutedTuner", "extend_peft_type", "register"]
