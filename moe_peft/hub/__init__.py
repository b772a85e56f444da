"""From a trained adapter to the Hub: one commit, and a model card that says how to load it."""

from __future__ import annotations

from .push import push_adapter

__all__ = ["push_adapter"]
