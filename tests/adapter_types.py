"""The adapter types, by what they have in common; a new one is in the lists by what it is."""

from __future__ import annotations

from moe_peft.config.config import MoeConfig
from moe_peft.config.fields import MixtureConfig
from moe_peft.methods import METHODS

# Types that need no further field to be made.
ALL: list[type[MoeConfig]] = list(METHODS.values())
# Types that add a routed sum of low-rank experts to linear layers.
ROUTED_SUMS = [cls for cls in ALL if issubclass(cls, MixtureConfig) and cls().placement == "linear"]
