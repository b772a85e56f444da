"""The layers with adapters, for programs that read or steer them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

import moe_peft
from tests.tiny import padded_batch, tiny_llama


def test_all_layers_are_found_in_order_and_can_be_steered():
    config = moe_peft.RoutedConfig(num_experts=3, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama(), config).eval()
    layers = moe_peft.routed_layers(model)
    names = {module: name for name, module in model.base_model.model.named_modules()}
    assert [layer.place for layer in layers] == [names[layer] for layer in layers] and len(layers) == 4
    for layer in layers:
        nn.init.normal_(layer.experts["default"].B)
        layer.router["default"].routed_scaling_factor = 0.0
    batch = padded_batch([5, 3])
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base)
    assert moe_peft.routed_layers(tiny_llama()) == []


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model='gpt2' is no model"):
        moe_peft.routed_layers("gpt2")
