"""The layer around experts with pairs: calls the module, refuses mixed batches, and gives the backbone back."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model

from moe_peft import ExpertLoraConfig
from moe_peft.layers import AdaptedExperts, adapted_experts
from tests.contract.cases import randomize, tiny_olmoe
from tests.expert_lora_models import BATCH


def adapted(**fields):
    model = get_peft_model(tiny_olmoe().double(), ExpertLoraConfig(**{"r": 3, **fields}))
    randomize(model)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, AdaptedExperts)]


def test_hooks_of_the_experts_and_of_the_bank_fire_once_a_call():
    model, seen = adapted(), []
    layer = layers_of(model)[0]
    for name, module in (("experts", layer.get_base_layer()), ("bank", layer.experts["default"])):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(**BATCH)
    assert seen == ["bank", "experts"]


def test_offloaded_experts_arrive():
    model = adapted()
    expected = model(**BATCH).logits
    for layer in layers_of(model):
        cpu_offload(layer.get_base_layer(), execution_device=torch.device("cpu"))
        assert layer.get_base_layer().down_proj.is_meta
    torch.testing.assert_close(model(**BATCH).logits, expected, rtol=0, atol=1e-12)


def test_disabled_or_merged_adapters_run_the_modules_own_forward(monkeypatch):
    model = adapted()
    monkeypatch.setattr(adapted_experts, "expert_lora", lambda *_: pytest.fail("the pass ran"))
    with model.disable_adapter():
        assert torch.equal(model(**BATCH).logits, tiny_olmoe().double()(**BATCH).logits)
    model.merge_adapter()
    model(**BATCH)
    with pytest.raises(pytest.fail.Exception):
        model.unmerge_adapter()
        model(**BATCH)


def test_adapters_cannot_be_mixed_in_a_batch_of_flattened_tokens():
    with pytest.raises(ValueError, match="flattened tokens"):
        adapted()(**BATCH, adapter_names=["default", "default"])


def test_another_dtype_or_device_is_followed():
    model = adapted()
    layer = layers_of(model)[0]
    model.bfloat16()
    assert {p.dtype for p in layer.experts["default"].parameters()} == {torch.bfloat16}
    assert model(**BATCH).logits.dtype == torch.bfloat16
