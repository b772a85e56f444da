"""Factors that are multiplied are refused together where a step in float32 cannot bear their product."""

from __future__ import annotations

import pytest

from moe_peft.methods import METHODS


@pytest.mark.parametrize(
    "cls", [cls for cls in METHODS.values() if "routed_scaling_factor" in cls.__dataclass_fields__]
)
def test_factors_without_a_product_in_range_are_refused_together(cls):
    for alpha, factor in ((1e5, 1e5), (1e-20, 1e-20), (8, 1e300), (8, 10**300)):
        with pytest.raises(ValueError, match=r"routed_scaling_factor=.* whose product with lora_alpha / r"):
            cls(lora_alpha=alpha, routed_scaling_factor=factor)
