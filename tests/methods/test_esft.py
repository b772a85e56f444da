"""ESFT is full fine-tuning of the selected experts and of nothing else: gradients, steps, files, options, refusals."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed as dist
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from moe_peft import EsftConfig, describe
from tests.methods.sparse_models import (
    EXPERTS,
    IMPLEMENTATIONS,
    KINDS,
    experts_modules,
    randomize_copies,
    sparse_model,
    token_batch,
)

FOUR = ("olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss")


def esft(model, **fields):
    return get_peft_model(model, EsftConfig(**{"task_type": "CAUSAL_LM", "experts": EXPERTS, **fields}))


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


def slices_of(model, adapter: str = "default") -> dict[tuple[str, str], torch.Tensor]:
    """(layer, tensor) -> the adapter's slices."""
    found = {}
    for name, parameter in model.named_parameters():
        if f".esft_experts.{adapter}." in name:
            found[name.split(".layers.")[1].split(".")[0], name.rpartition(".")[2]] = parameter
    return found


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
@pytest.mark.parametrize("kind", [*FOUR, "nemotron_h"])
def test_gradients_equal_full_fine_tuning_restricted_to_the_selected_experts(kind, implementation):
    batch, base = token_batch(), sparse_model(kind, implementation)
    loss, expected = full_gradients(copy.deepcopy(base), batch)
    model = esft(base)
    found = model(**batch).loss
    found.backward()
    torch.testing.assert_close(found.detach(), loss, rtol=1e-6, atol=0)
    assert_relatively_close({key: p.grad for key, p in slices_of(model).items()}, expected, 1e-6)


@pytest.mark.parametrize("kind", FOUR)
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


@pytest.mark.parametrize("kind", FOUR)
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
@pytest.mark.parametrize("kind", FOUR)
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


def lora_reference(module, bank, ids, scaling, hidden, index, weights):
    """Loop over slots: a low-rank expert beside each selected one, under the backbone's weight."""
    out = module(hidden, index, weights)
    rows = []
    for t in range(len(hidden)):
        y = out[t]
        for k in range(index.shape[1]):
            if int(index[t, k]) in ids:
                e = ids.index(int(index[t, k]))
                y = y + weights[t, k] * scaling * (bank.B[e].T @ (bank.A[e] @ hidden[t]))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", FOUR)
def test_low_rank_experts_stand_beside_the_selected_ones_only(kind):
    fields = {"expert_adapter": "lora", "r": 2, "lora_alpha": 6, "init_weights": False}
    base = sparse_model(kind).double()
    twin = copy.deepcopy(base)
    model = esft(base, **fields)
    calls = []
    for module in experts_modules(twin):
        module.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    twin(**token_batch())
    layers = [module for module in model.modules() if type(module).__name__ == "RoutedExperts"]
    assert len(layers) == 2
    for number, (layer, (args, kwargs)) in enumerate(zip(layers, calls, strict=True)):
        call = [*args, *kwargs.values()]
        bank, ids = layer.experts["default"], EXPERTS[str(number)]
        expected = lora_reference(layer.base_layer, bank, ids, 3.0, *call)
        # The backbones' weights are float32.
        torch.testing.assert_close(layer(*args, **kwargs), expected, rtol=1e-6, atol=1e-6)
        unused = torch.tensor([e for e in range(8) if e not in ids])[:3].expand_as(call[1])
        assert torch.equal(layer(call[0], unused, call[2]), layer.base_layer(call[0], unused, call[2]))


def test_a_stock_lora_beside_it_saves_and_loads(tmp_path):
    base, batch = sparse_model("olmoe").requires_grad_(False), token_batch()
    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="stock")
    model.add_adapter(EsftConfig(experts=EXPERTS), adapter_name="ours")
    randomize_copies(model)
    model.set_adapter(["stock", "ours"])
    both = model(**batch).logits
    found = {}
    for name, own in (("stock", ".lora_"), ("ours", "esft_experts.")):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        keys = set(load_file(tmp_path / name / "adapter_model.safetensors"))
        assert keys and all(own in key for key in keys)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        found[name] = model(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, found[name], rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(base)
    for name in ("stock", "ours"):
        again.load_adapter(str(tmp_path / name), adapter_name=name)
    again.set_adapter(["stock", "ours"])
    torch.testing.assert_close(again.eval()(**batch).logits, both, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["stock"], found["ours"]) and not torch.allclose(found["ours"], both)


def test_transformers_own_loading_takes_the_adapter(tmp_path):
    base, batch = sparse_model("olmoe").requires_grad_(False), token_batch()
    model = esft(copy.deepcopy(base))
    randomize_copies(model)
    model.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))
    state = model.base_model.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    torch.testing.assert_close(base.eval()(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


def published_model() -> DeepseekV2ForCausalLM:
    """DeepSeek-V2-Lite without memory: 64 experts in the layers 1 to 26, 2048 wide, intermediate width 1408."""
    config = DeepseekV2Config(
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        vocab_size=102400,
        q_lora_rank=None,
        kv_lora_rank=512,
    )
    with torch.device("meta"):
        return DeepseekV2ForCausalLM(config)


def test_parameter_counts_are_those_of_the_paper_for_deepseek_v2_lite():
    model = published_model()
    for count, billions in ((124, 1.073), (153, 1.324), (128, 1.107), (83, 0.718)):
        # Only the number of selected experts matters; they are dealt to the layers in turn.
        experts = {str(layer): list(range(len(range(layer - 1, count, 26)))) for layer in range(1, 27)}
        description = describe(model, EsftConfig(experts=experts))
        assert description.num_parameters == count * 8_650_752
        assert round(description.num_parameters / 1e9, 3) == billions
    adapted = get_peft_model(model, EsftConfig(experts=experts), low_cpu_mem_usage=True)
    assert adapted.get_nb_trainable_parameters()[0] == 83 * 8_650_752
    assert all(parameter.is_meta for parameter in adapted.parameters())


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ({1: [5, 2], 0: (3,)}, {"1": [2, 5], "0": [3]}),
        ({"01": range(2), "0": []}, {"1": [0, 1], "0": []}),
    ],
)
def test_layers_may_be_numbers_and_ids_in_any_order(experts, expected):
    config = EsftConfig(experts=experts)
    assert config.experts == expected
    model = get_peft_model(sparse_model("olmoe"), config)
    assert {layer for layer, _ in slices_of(model)} == {layer for layer, ids in expected.items() if ids}


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"1": [2, 2]}, "different expert ids"),
        ({"1": [-1]}, "different expert ids"),
        ({"1": [2.5]}, "different expert ids"),
        ({"1": ["2"]}, "different expert ids"),
        ({"1": [True]}, "different expert ids"),
        ({"1": 2}, "different expert ids"),
        ({"-1": [2]}, "'-1' is no layer"),
        ({"experts": {"1": [2]}, "shared_experts": False}, "take the entry 'experts'"),
        ({"1": [2], 1: [3]}, "no layer twice"),
    ],
)
def test_a_selection_that_is_none_is_refused_where_it_is_written(experts, message):
    with pytest.raises(ValueError, match=message):
        EsftConfig(experts=experts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": None}, "score the experts"),
        ({"experts": {}}, "score the experts"),
        ({"experts": {"0": []}}, "score the experts"),
        ({"experts": {"2": [1]}}, r"layers with experts, \[0, 1\]; layer 2 has none"),
        ({"experts": {"1": [3, 8]}}, "below 8 in layer 1, which 8 is not"),
        ({"target_modules": ["layers.0.mlp.experts"]}, "None, as `experts` names the layers"),
        ({"experts": {"0": [1]}, "target_modules": ["experts"]}, "None, as `experts` names the layers"),
        ({"target_modules": ["q_proj"]}, "None, as `experts` names the layers"),
        ({"train_shared_experts": True}, "the model has no such experts"),
        ({"num_backbone_experts": 16}, "selected in another model"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_changed(fields, message):
    model = sparse_model("olmoe")
    names = [name for name, _ in model.named_modules()]
    for attempt in (esft, lambda model, **fields: describe(model, EsftConfig(**{"experts": EXPERTS, **fields}))):
        with pytest.raises(ValueError, match=message):
            attempt(model, **fields)
        assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, "set expert_adapter='lora'"),
        ({"top_k": 2}, "the backbone routes"),
        ({"num_experts": 4}, "the backbone routes"),
        ({"layers_to_transform": [0]}, "`experts` names the layers"),
        ({"exclude_modules": ["experts"]}, "`experts` names the layers"),
        ({"expert_adapter": "ia3"}, "'full', 'lora'"),
    ],
)
def test_fields_of_other_methods_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EsftConfig(experts=EXPERTS, **fields)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("olmoe", {"num_experts": 16}, "selected in another model"),
        ("olmoe", {"num_experts": 4}, "below 4 in layer 0, which 6 is not"),
        ("deepseek_v3", {"first_k_dense_replace": 1}, r"layers with experts, \[1\]; layer 0 has none"),
        ("olmoe", {"intermediate_size": 24}, "No weight has been changed"),
    ],
)
def test_loading_on_another_base_model_is_refused(kind, overrides, message, tmp_path):
    esft(sparse_model(kind)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(sparse_model(kind, **overrides), tmp_path)


def test_configuration_round_trip_keeps_every_field(tmp_path):
    config = EsftConfig(experts=EXPERTS, train_router=True, expert_adapter="lora", r=8, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_experts_that_are_split_over_processes_are_refused(tmp_path):
    model = sparse_model("olmoe")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts are split over processes \(expert parallelism"):
        esft(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = sparse_model("olmoe")
        mesh = dist.init_device_mesh("cpu", (1,))
        module = model.model.layers[0].mlp.experts
        module.down_proj = torch.nn.Parameter(dist.tensor.distribute_tensor(module.down_proj.data, mesh))
        with pytest.raises(ValueError, match="distributed tensors"):
            esft(model)
    finally:
        dist.destroy_process_group()


def test_experts_in_eight_bits_are_refused_with_the_low_rank_way_out():
    model = sparse_model("olmoe").requires_grad_(False)
    for module in experts_modules(model):
        module.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="must be 'lora'"):
        esft(model)


def test_step_zero_equals_the_base_to_the_rounding_of_one_sum():
    base, batch = sparse_model("olmoe").requires_grad_(False), token_batch()
    expected = base(**batch).logits
    output = esft(copy.deepcopy(base))(**batch).logits
    # Three terms are added in another order than in the backbone's loop.
    assert (output - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert math.isfinite(float(output.sum())) and set(KINDS) >= set(FOUR)
