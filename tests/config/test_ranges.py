"""Numbers that a step in float32 cannot bear, and sizes that no machine has, are refused; what is allowed trains."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import LoraMoeConfig, RoutedConfig, SiraConfig
from moe_peft.config.ranges import LARGEST, SMALLEST, is_coefficient
from tests.tiny import padded_batch, tiny_llama


@pytest.mark.parametrize("value", [1e7, 1e39, 10**300, 1e-40])
def test_a_coefficient_outside_of_the_range_is_refused(value):
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        with pytest.raises(ValueError, match=f"{name}=.* must be zero or a positive number from 1e-30 to 1e[+]06"):
            LoraMoeConfig(**{name: value})
    with pytest.raises(
        ValueError, match=r"losses=.* must be a dict with weights that are zero or positive numbers from"
    ):
        RoutedConfig(losses={"importance": value})


@pytest.mark.parametrize("value", [2**16 + 1, 10**9, 10**400])
def test_a_size_that_no_layer_has_is_refused(value):
    with pytest.raises(ValueError, match=r"r=.* must be (a rank of at least 1 and at most 65536|an integer, below)"):
        LoraMoeConfig(r=value)
    with pytest.raises(ValueError, match=r"num_experts=.* must be (at least 1 and at most 1048576|an integer, below)"):
        SiraConfig(num_experts=value * 2**5)


def test_the_largest_factors_still_train():
    """A step and its squares stay finite, so that the range is not too wide."""
    torch.manual_seed(0)
    config = RoutedConfig(num_experts=3, lora_alpha=1e6, r=1, router_z_loss_coef=1e6, router_aux_loss_coef=1e6)
    model = get_peft_model(tiny_llama(), config).train()
    batch = padded_batch([9, 6])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-12)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert all(bool(torch.isfinite(s["exp_avg_sq"]).all()) for s in optimizer.state.values())


def test_a_coefficient_is_zero_or_in_the_range():
    assert all(map(is_coefficient, (0, SMALLEST, 1, LARGEST)))
    assert not any(map(is_coefficient, (-1, SMALLEST / 2, LARGEST * 2, float("nan"), float("inf"))))
