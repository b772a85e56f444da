"""A configuration is checked again before a model is changed, and its messages name class, field and value."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from moe_peft import RoutedConfig, describe
from tests.tiny import tiny_llama


@pytest.mark.parametrize(("name", "value"), [("r", 10**40), ("lora_alpha", "8"), ("num_experts", 0), ("router", "x")])
def test_a_configuration_that_was_changed_is_checked_before_the_model_is(name, value):
    base, config = tiny_llama(), RoutedConfig(num_experts=3)
    setattr(config, name, value)
    before = [(key, type(module)) for key, module in base.named_modules()]
    for use in (get_peft_model, describe):
        with pytest.raises(ValueError, match=f"^RoutedConfig: {name}="):
            use(base, config)
    assert [(key, type(module)) for key, module in base.named_modules()] == before
