"""What one forward pass knows, and the router losses' way into its gradient."""

from __future__ import annotations

from .objective import router_loss

__all__ = ["router_loss"]
