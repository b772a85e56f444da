"""Numbers that a step in float32 cannot bear, and sizes that no machine has, are refused where they are written."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import LoraMoeConfig, RoutedConfig, SiraConfig, describe
from moe_peft.methods import METHODS
from tests.tiny import padded_batch, tiny_llama

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


@pytest.mark.parametrize(
    "cls", [cls for cls in METHODS.values() if "routed_scaling_factor" in cls.__dataclass_fields__]
)
def test_factors_without_a_product_in_range_are_refused_together(cls):
    for alpha, factor in ((1e5, 1e5), (1e-20, 1e-20), (8, 1e300), (8, 10**300)):
        with pytest.raises(ValueError, match=r"routed_scaling_factor=.* whose product with lora_alpha / r"):
            cls(lora_alpha=alpha, routed_scaling_factor=factor)


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


@pytest.mark.parametrize(("name", "value"), [("r", 10**40), ("lora_alpha", "8"), ("num_experts", 0), ("router", "x")])
def test_a_configuration_that_was_changed_is_checked_before_the_model_is(name, value):
    base, config = tiny_llama(), RoutedConfig(num_experts=3)
    setattr(config, name, value)
    before = [(key, type(module)) for key, module in base.named_modules()]
    for use in (get_peft_model, describe):
        with pytest.raises(ValueError, match=f"^RoutedConfig: {name}="):
            use(base, config)
    assert [(key, type(module)) for key, module in base.named_modules()] == before
