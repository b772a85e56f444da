"""Adapters on a mixture-of-experts backbone on a CUDA device; deselected elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from moe_peft import MoeBitsAndBytesConfig
from tests.contract.cases import METHODS, OF_EXPERTS, randomize, tiny_deepseek_v2, tiny_olmoe
from tests.test_gpu import cuda, on_cuda  # noqa: F401
from tests.tiny import padded_batch, train

pytestmark = pytest.mark.gpu
ON_EXPERTS = ["perft-r", "perft-d", *OF_EXPERTS, "mov"]


@pytest.mark.parametrize("build", [tiny_olmoe, tiny_deepseek_v2])
@pytest.mark.parametrize("method", ON_EXPERTS)
def test_cuda_agrees_with_cpu_forward_and_gradient(build, method):
    model = get_peft_model(build(), METHODS[method](task_type="CAUSAL_LM")).train()
    randomize(model)
    twin = copy.deepcopy(model).cuda()
    batch = padded_batch([9, 6, 9])
    outputs = [m(**b, labels=b["input_ids"]) for m, b in ((model, batch), (twin, on_cuda(batch)))]
    torch.testing.assert_close(outputs[1].logits.cpu(), outputs[0].logits, rtol=1e-3, atol=1e-3)
    for output in outputs:
        output.loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.requires_grad:
            assert (q.grad.cpu() - p.grad).norm() <= 1e-2 * p.grad.norm() + 1e-6, name


@pytest.mark.parametrize("method", ON_EXPERTS)
def test_bfloat16_trains_with_grouped_experts_and_generates(method):
    base = tiny_olmoe().to(torch.bfloat16).cuda()
    base.set_experts_implementation("grouped_mm")
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM")).train()
    batch = on_cuda(padded_batch([9, 6, 9]))
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    tokens = model.eval().generate(**on_cuda(padded_batch([5, 5])), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 9)


@pytest.mark.bnb
def test_experts_that_are_loaded_in_four_bits_train_and_generate_on_cuda(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_olmoe().save_pretrained(tmp_path)
    config = MoeBitsAndBytesConfig(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map={"": 0}
    )
    assert {p.device.type for p in base.parameters()} == {"cuda"}
    model = get_peft_model(base, METHODS["perft-e"](task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = on_cuda(padded_batch([9, 6, 9]))
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and all(g is not None and torch.isfinite(g).all() for g in grads)
    tokens = model.eval().generate(**on_cuda(padded_batch([5, 5])), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 9)


@pytest.mark.bnb
@pytest.mark.parametrize("method", ["perft-e", "esft", "esft-lora"])
def test_four_bit_experts_train_on_cuda(method):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    base = tiny_olmoe().to(torch.bfloat16).cuda()
    for layer in base.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
    batch = on_cuda(padded_batch([9, 6, 9]))
    expected = base.eval()(**batch).logits
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM")).eval()
    if method != "esft":  # whole slices start from the dequantized values, in another order of sums
        assert torch.equal(model(**batch).logits, expected)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and all(g is not None and torch.isfinite(g).all() for g in grads)
