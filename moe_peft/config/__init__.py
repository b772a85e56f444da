"""What an adapter is: its fields and their checks, the parts it builds, its files and its part of a model card."""

from __future__ import annotations

from .config import MoeConfig
from .fields import RoutedMoeConfig
from .parts import RoutedParts

__all__ = ["MoeConfig", "RoutedMoeConfig", "RoutedParts"]
