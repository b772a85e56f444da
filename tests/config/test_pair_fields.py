"""The scale of low-rank pairs stays in the range that a step in float32 can bear."""

from __future__ import annotations

import pytest

from moe_peft import RoutedConfig
from moe_peft.methods import METHODS

SCALED = [cls for cls in METHODS.values() if hasattr(cls, "scaling")]


def extra(cls) -> dict:
    return {"expert_adapter": "lora"} if "expert_adapter" in cls.__dataclass_fields__ else {}


@pytest.mark.parametrize("cls", SCALED)
@pytest.mark.parametrize("value", [1e39, 1e300, 10**300, 1e7 * 16, 1e-40, 5e-324])
def test_a_scale_outside_of_the_range_is_refused(cls, value):
    with pytest.raises(
        ValueError, match=r"lora_alpha=.* must be a positive number with a factor lora_alpha / r from 1e-30"
    ):
        cls(lora_alpha=value, **extra(cls))


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 3 / 4), (True, 3 / 2)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(use_rslora, scaling):
    assert RoutedConfig(r=4, lora_alpha=3, use_rslora=use_rslora).scaling == scaling
