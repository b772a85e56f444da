"""`moe-peft ...`: thin verbs over the training scripts, the dry run and the tools."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
