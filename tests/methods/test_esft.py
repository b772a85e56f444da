"""ESFT's configuration: what it selects, describes, refuses, and gets along with; its low-rank form."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed as dist
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from moe_peft import EsftConfig, ExpertSelection, describe
from tests.methods.esft_models import (
    EXPERTS,
    FOUR_KINDS,
    esft,
    experts_modules,
    randomize_copies,
    slices_of,
    sparse_model,
    token_batch,
)


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


@pytest.mark.parametrize("kind", FOUR_KINDS)
def test_low_rank_experts_stand_beside_the_selected_ones_only(kind):
    fields = {"expert_adapter": "lora", "r": 2, "lora_alpha": 6, "init_weights": False}
    base = sparse_model(kind).double()
    twin = copy.deepcopy(base)
    model = esft(base, **fields).eval()
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
        ([1, 2], r"experts=\[1, 2\] must be a dict"),
        ("expert_config.json", "ExpertSelection.load"),
        (
            ExpertSelection({"1": [2]}),
            "`selection.experts`, where the selection is what moe_peft.select_experts",
        ),
        ({"-1": [2]}, "'-1' is no layer"),
        ({"experts": {"1": [2]}, "shared_experts": False}, "as the entry 'experts' of a selection's file"),
        ({"1": [2], 1: [3]}, "a layer is named twice"),
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
        ({"train_shared_experts": True}, "name others in modules_to_save"),
        ({"num_backbone_experts": 16}, "selected in another model"),
        ({"modules_to_save": ["layers.1"]}, r"would train \['model.layers.1.mlp.experts'\] whole"),
        ({"modules_to_save": ["experts"]}, "Name parts beside the experts"),
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
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.experts are split over processes.*ep_implementation='moe_peft'"
    ):
        esft(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = sparse_model("olmoe")
        mesh = dist.init_device_mesh("cpu", (1,))
        module = model.model.layers[0].mlp.experts
        module.down_proj = torch.nn.Parameter(dist.tensor.distribute_tensor(module.down_proj.data, mesh))
        with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts are split over processes"):
            esft(model)
    finally:
        dist.destroy_process_group()


def test_experts_in_eight_bits_are_refused_with_the_low_rank_way_out():
    model = sparse_model("olmoe").requires_grad_(False)
    experts_modules(model)[1].to(torch.float8_e4m3fn)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"must be 'lora' for model\.layers\.1\.mlp\.experts"):
        esft(model)
    assert [name for name, _ in model.named_modules()] == names
    esft(model, expert_adapter="lora")
