"""Which modules of a model an adapter wraps."""

from __future__ import annotations

from .choose import find_places, resolve_targets

__all__ = ["find_places", "resolve_targets"]
