"""ESFT is full fine-tuning of the selected experts and of nothing else: gradients, steps, and what a file holds."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from tests.methods.esft_models import (
    EXPERTS,
    FOUR_KINDS,
    IMPLEMENTATIONS,
    esft,
    experts_modules,
    randomize_copies,
    slices_of,
    sparse_model,
    token_batch,
)


def trained(model, steps: int = 3, **batch_fields):
    """AdamW with weight decay on whatever the model trains; returns the optimizer."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for seed in range(steps):
        model(**token_batch(seed=seed, **batch_fields)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


def full_gradients(model, batch):
    """Gradients of full fine-tuning, restricted to the selected experts."""
    model.requires_grad_(True)
    loss = model(**batch).loss
    loss.backward()
    modules = experts_modules(model)
    return loss.detach(), {
        (layer, name): parameter.grad[ids]
        for layer, ids in EXPERTS.items()
        for name, parameter in modules[int(layer)].named_parameters(recurse=False)
    }


def assert_relatively_close(found, expected, tolerance):
    assert found.keys() == expected.keys() and expected
    for key, wanted in expected.items():
        assert wanted.abs().max() > 0, key
        assert (found[key] - wanted).norm() <= tolerance * wanted.norm(), key


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [*FOUR_KINDS, "nemotron_h"])
def test_gradients_equal_full_fine_tuning_restricted_to_the_selected_experts(kind, implementation):
    batch, base = token_batch(), sparse_model(kind, implementation)
    loss, expected = full_gradients(copy.deepcopy(base), batch)
    model = esft(base)
    found = model(**batch).loss
    found.backward()
    torch.testing.assert_close(found.detach(), loss, rtol=1e-6, atol=0)
    assert_relatively_close({key: p.grad for key, p in slices_of(model).items()}, expected, 1e-6)


@pytest.mark.parametrize("kind", FOUR_KINDS)
def test_float64_gradients_equal_full_fine_tuning_to_rounding(kind):
    batch, base = token_batch(), sparse_model(kind).double()
    loss, expected = full_gradients(copy.deepcopy(base), batch)
    model = esft(base)
    found = model(**batch).loss
    found.backward()
    torch.testing.assert_close(found.detach(), loss, rtol=1e-12, atol=0)
    # Routers work in float32 inside a float64 model, so rounding there passes through.
    assert_relatively_close({key: p.grad for key, p in slices_of(model).items()}, expected, 1e-10)


def test_selecting_all_experts_is_full_fine_tuning_of_them():
    everything = {layer: list(range(8)) for layer in EXPERTS}
    batch, base = token_batch(), sparse_model("olmoe").double()
    twin = copy.deepcopy(base).requires_grad_(True)
    twin(**batch).loss.backward()
    model = esft(base, experts=everything)
    model(**batch).loss.backward()
    for (layer, name), parameter in slices_of(model).items():
        wanted = getattr(experts_modules(twin)[int(layer)], name).grad
        assert (parameter.grad - wanted).norm() <= 1e-10 * wanted.norm()


def test_routers_that_train_get_the_gradients_of_full_fine_tuning():
    batch, base = token_batch(), sparse_model("qwen3_moe").double()
    twin = copy.deepcopy(base).requires_grad_(True)
    twin(**batch).loss.backward()
    model = esft(base, train_router=True)
    model(**batch).loss.backward()
    for layer in (0, 1):
        wanted = twin.model.layers[layer].mlp.gate.weight.grad
        found = model.base_model.model.model.layers[layer].mlp.gate.modules_to_save["default"].weight.grad
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointing_repeats_the_routing_also_while_routers_train(implementation, use_reentrant):
    model, batch = esft(sparse_model("olmoe", implementation), train_router=True), token_batch()
    randomize_copies(model)
    model.train()
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("gate" in name for name in expected)
    assert_relatively_close(found, expected, 1e-5)


@pytest.mark.parametrize("kind", FOUR_KINDS)
def test_training_leaves_every_other_weight_as_it_was_bit_for_bit(kind):
    base = sparse_model(kind)
    before = copy.deepcopy(base).state_dict()
    model = esft(base)
    copies = {key: p.detach().clone() for key, p in slices_of(model).items()}
    optimizer = trained(model)
    assert all(not torch.equal(p, copies[key]) for key, p in slices_of(model).items())
    unloaded = model.unload()
    after = unloaded.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())

    trainable = sum(copy.numel() for copy in copies.values())
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert sum(state.numel() for state in states) == 2 * trainable
    modules = experts_modules(unloaded)
    each = sum(p.numel() for p in modules[0].parameters()) // 8
    assert trainable == each * sum(map(len, EXPERTS.values()))


def test_the_file_holds_the_slices_and_the_configuration_the_ids(tmp_path):
    model = esft(sparse_model("gpt_oss"))
    trained(model)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    assert set(file) == {
        f"base_model.model.model.layers.{layer}.mlp.experts.esft_experts.{name}" for layer in (0, 1) for name in names
    }
    parameters = {name for name, _ in model.named_parameters() if "esft" in name}
    assert "base_model.model.model.layers.1.mlp.experts.esft_experts.default.gate_up_proj" in parameters
    for (layer, name), parameter in slices_of(model).items():
        assert torch.equal(file[f"base_model.model.model.layers.{layer}.mlp.experts.esft_experts.{name}"], parameter)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["experts"] == EXPERTS and written["num_backbone_experts"] == 8
    assert PeftConfig.from_pretrained(tmp_path).experts == EXPERTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOUR_KINDS)
def test_base_and_adapter_are_the_trained_model_bit_for_bit_and_so_is_the_merged_one(kind, dtype, tmp_path):
    base = sparse_model(kind, "grouped_mm").to(dtype)
    model, batch = esft(copy.deepcopy(base)), token_batch(seed=9)
    assert {p.dtype for p in slices_of(model).values()} == {torch.float32}  # peft's master weights
    trained(model)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).eval()
        assert torch.equal(loaded(**batch).logits, expected)
        for key, parameter in slices_of(loaded).items():
            assert torch.equal(parameter, slices_of(model)[key].to(parameter.dtype))

    merged, trained_slices = model.merge_and_unload(safe_merge=True), slices_of(loaded)
    original = dict(base.named_parameters())
    for name, parameter in merged.named_parameters():
        layer, leaf = name.partition(".layers.")[2].partition(".")[0], name.rpartition(".")[2]
        wanted = original[name].detach().clone()
        if ".experts." in name and layer in EXPERTS:
            wanted[EXPERTS[layer]] = trained_slices[layer, leaf].to(dtype)
        assert torch.equal(parameter, wanted), name
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (merged(**batch).logits - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_shared_experts_and_routers_train_where_asked_and_come_back(kind, tmp_path):
    base = sparse_model(kind).requires_grad_(False)
    fields = {"experts": {"1": [2]}, "modules_to_save": ["lm_head"]}
    model = esft(copy.deepcopy(base), train_shared_experts=True, train_router=True, **fields)
    batch = token_batch(seed=9)
    trains = {n.split(".modules_to_save")[0].split(".esft")[0] for n, p in model.named_parameters() if p.requires_grad}
    block = "base_model.model.model.layers.1.mlp"
    shared = "shared_expert" if kind == "qwen2_moe" else "shared_experts"
    assert trains == {f"{block}.experts", f"{block}.{shared}", f"{block}.gate", "base_model.model.lm_head"}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trained(model)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
    expected = model(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train_router", [False, True])
def test_the_backbones_own_balance_loss_keeps_working(train_router):
    base = sparse_model("olmoe").requires_grad_(False)
    batch = {**token_batch(), "output_router_logits": True}
    model = esft(copy.deepcopy(base), train_router=train_router)
    output, expected = model(**batch), base(**batch)
    assert [r.shape for r in output.router_logits] == [r.shape for r in expected.router_logits]
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    torch.testing.assert_close(output.loss, expected.loss)
    output.aux_loss.backward()
    routers = [p.grad for n, p in model.named_parameters() if "gate.modules_to_save" in n]
    assert len(routers) == 2 * train_router and all(grad.any() for grad in routers)


def test_step_zero_equals_the_base_to_the_rounding_of_one_sum():
    base, batch = sparse_model("olmoe").requires_grad_(False), token_batch()
    expected = base(**batch).logits
    output = esft(copy.deepcopy(base))(**batch).logits
    # Three terms are added in another order than in the backbone's loop.
    assert (output - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * expected.abs().max()
