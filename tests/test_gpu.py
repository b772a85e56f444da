"""What only a CUDA device can show; deselected elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from moe_peft import LoraMoeConfig, RoutedConfig, SiraConfig
from tests.contract.cases import groups_for, randomize
from tests.tiny import padded_batch, tiny_llama, train

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def on_cuda(batch: dict) -> dict:
    return {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.parametrize("config_cls", [LoraMoeConfig, SiraConfig, RoutedConfig])
def test_cuda_agrees_with_cpu_forward_and_gradient(config_cls):
    config = config_cls(task_type="CAUSAL_LM", num_experts=4)
    config.lora_dropout = config.expert_dropout = 0.0
    model = get_peft_model(tiny_llama(), config).train()
    randomize(model)
    twin = copy.deepcopy(model).cuda()
    batch = padded_batch([9, 6, 9])
    outputs = [m(**b, labels=b["input_ids"]) for m, b in ((model, batch), (twin, on_cuda(batch)))]
    torch.testing.assert_close(outputs[1].logits.cpu(), outputs[0].logits, rtol=1e-3, atol=1e-3)
    for output in outputs:
        output.loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.requires_grad:
            error = (q.grad.cpu() - p.grad).norm()
            assert error <= 1e-2 * p.grad.norm() + 1e-6, name


def test_bfloat16_step_does_not_wait_for_the_device():
    config = LoraMoeConfig(task_type="CAUSAL_LM", num_experts=4, expert_groups=[0, 0, 1, 1])
    model = get_peft_model(tiny_llama().to(torch.bfloat16).cuda(), config).train()
    batch = on_cuda(padded_batch([9, 6, 9]))
    groups = {name: tensor.cuda() for name, tensor in groups_for(config, batch).items()}
    model(**batch, **groups, labels=batch["input_ids"]).loss.backward()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 9, layer.in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.bnb
def test_four_bit_model_trains_on_cuda(tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map={"": 0})
    model = get_peft_model(base, LoraMoeConfig(task_type="CAUSAL_LM")).train()
    batch = on_cuda(padded_batch([9, 6, 9]))
    losses = train(model, batch)
    assert losses[-1] < losses[0]
