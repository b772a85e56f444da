"""Stock LoRA on fused experts gives the same numbers accelerated, on every type whose experts transformers fuses."""

from __future__ import annotations

import copy

import pytest
import torch

from moe_peft import accelerate_expert_lora
from moe_peft.layers.accelerated_lora import AcceleratedParamWrapper
from tests.backbones.cases import base_model, batch_for, marked
from tests.backbones.models import FOLLOWED
from tests.expert_lora_models import assert_equal_to, logits_and_gradients, stock_lora

# Their experts are no 3-D parameters, which stock peft does not reach.
OUT_OF_REACH = ("dbrx",)
CASES = [marked(model_type) for model_type in FOLLOWED if model_type not in OUT_OF_REACH]


@pytest.mark.parametrize("model_type", CASES)
def test_outputs_and_gradients_equal_stock_and_are_computed_in_activation_space(model_type):
    model, batch = stock_lora(copy.deepcopy(base_model(model_type))), batch_for(base_model(model_type))
    batch = {"input_ids": batch["input_ids"]}
    expected = logits_and_gradients(model, batch)
    accelerate_expert_lora(model)
    assert all(isinstance(m, AcceleratedParamWrapper) for m in model.modules() if type(m).__name__ == "ParamWrapper")
    assert_equal_to(logits_and_gradients(model, batch), expected, 1e-4)
    with torch.no_grad():
        one = {"input_ids": batch["input_ids"][:1, :1]}
        fast = model(**one).logits
        accelerate_expert_lora(model, False)
        torch.testing.assert_close(fast, model(**one).logits, rtol=1e-4, atol=1e-5)
