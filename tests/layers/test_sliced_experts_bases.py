"""Experts' copies beside bases of every form: compiled, in 16 bits, hooked, quantized, sharded."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import fully_shard

from tests.methods.esft_models import (
    EXPERTS,
    IMPLEMENTATIONS,
    esft,
    experts_modules,
    first_layer,
    frozen_and_adapted,
    logits,
    randomize_copies,
    sparse_model,
    token_batch,
)


@pytest.mark.parametrize(("kind", "implementation"), [("olmoe", "grouped_mm"), ("gpt_oss", "batched_mm")])
def test_one_compiled_graph_gives_the_same_outputs_and_gradients(kind, implementation):
    _, model = frozen_and_adapted(kind, implementation)
    model.train()
    batch = token_batch()
    outputs, grads = [], []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        output = call(**batch)
        output.loss.backward()
        outputs.append(output.logits.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("fields", [{}, {"expert_adapter": "lora", "r": 2}])
def test_the_second_step_compiles_nothing(fields):
    model = esft(sparse_model("olmoe", "grouped_mm"), **fields).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        compiled(**token_batch(seed=seed)).loss.backward()
        assert counter.frame_count == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sixteen_bit_base_computes_with_rounded_copies_and_autocast_with_the_backbones_precision(implementation):
    base = sparse_model("olmoe", implementation).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(base)
        found = logits(esft(copy.deepcopy(base)).eval())
    # Experts are added up in another order, which rounding to 16 bits shows.
    assert (found - expected).norm() <= 0.05 * expected.norm()
    half = esft(base.to(torch.bfloat16)).eval()
    assert {p.dtype for n, p in half.named_parameters() if "esft" in n} == {torch.float32}
    before = logits(half)
    assert before.dtype == torch.bfloat16
    for name, parameter in half.named_parameters():
        if "esft" in name:
            parameter.data += 1e-6 * parameter.data.abs()  # less than rounding
    assert torch.equal(logits(half), before)


def test_replaced_forwards_and_hooks_of_the_experts_run_once_for_the_frozen_ones():
    _, model = frozen_and_adapted()
    expected = logits(model)
    base, calls = first_layer(model).base_layer, []
    inner = base.forward
    base.forward = lambda *args, **kwargs: (calls.append("forward"), inner(*args, **kwargs))[1]
    base.register_forward_pre_hook(lambda *_: calls.append("hook"))
    assert torch.equal(logits(model), expected)
    assert calls == ["hook", "forward"]
    assert base.num_experts == 8 and len(base.gate_up_proj) == 8


def quantized(model):
    """Fused experts in four bits, as bitsandbytes stores them."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module in experts_modules(model):
        for name in [name for name, p in module.named_parameters(recurse=False) if p.dim() == 3]:
            replace_parameter_4bit(module, name, quant_type="nf4")
    return model


@pytest.mark.bnb
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_copies_train_beside_quantized_experts_and_come_back(kind, implementation, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = quantized(sparse_model(kind, implementation).requires_grad_(False))
    dense = experts_modules(base)[0].gate_up_proj.clone()
    expected = logits(base)
    model = esft(base)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    layer = first_layer(model)
    assert torch.equal(layer.experts["default"].gate_up_proj, dense[EXPERTS["0"]])
    assert layer.experts["default"].gate_up_proj.dtype == torch.float32
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(6):
        loss = model.train()(**token_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(layer.base_layer.gate_up_proj, dense)
    found = logits(model.eval())
    with pytest.raises(ValueError, match="are quantized, so trained ones cannot be written into them"):
        model.merge_and_unload()
    assert torch.equal(logits(model), found)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(sparse_model(kind, implementation).requires_grad_(False)), tmp_path)
    state = again.eval().state_dict()
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters() if "esft" in name)
    assert torch.equal(logits(again), found)


@pytest.mark.bnb
@pytest.mark.parametrize("four_bits", [False, True])
def test_experts_that_are_a_unit_of_sharding_of_their_own_train_the_same(four_bits, tmp_path):
    base = sparse_model("olmoe")
    if four_bits:
        pytest.importorskip("bitsandbytes")
        base = quantized(base)
    model, batch = esft(base).train(), token_batch()
    randomize_copies(model)
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer.mlp.experts.base_layer)
            fully_shard(layer)
        fully_shard(model)(**batch).loss.backward()
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        dist.destroy_process_group()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
