"""Router losses by name. Called on a `Routing`, each returns an unscaled 0-d float32 tensor."""

from __future__ import annotations

from collections.abc import Callable

from .importance import importance
from .load_balancing import gshard_load_balancing, load_balancing
from .localized_balancing import LocalizedBalancing
from .z_loss import z_loss

LOSSES: dict[str, Callable] = {
    "load_balancing": load_balancing,
    "gshard_load_balancing": gshard_load_balancing,
    "importance": importance,
    "localized_balancing": LocalizedBalancing,
    "z_loss": z_loss,
}

__all__ = ["LOSSES", "LocalizedBalancing", "gshard_load_balancing", "importance", "load_balancing", "z_loss"]
