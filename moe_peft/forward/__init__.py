"""What one forward pass knows, and the router losses' way into its gradient."""

from __future__ import annotations

from .objective import router_loss
from .sample_groups import groups

__all__ = ["groups", "router_loss"]
