"""The life of adapters on whole blocks and on a backbone's experts in stock peft and transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from moe_peft import LoraMoeConfig, MovConfig, PerftConfig, RoutedConfig
from tests.contract.cases import METHODS, randomize, tiny_deepseek_v2, tiny_olmoe
from tests.tiny import padded_batch

LOW_RANK, ROUTED, SLICES = (
    ("experts.A", "experts.B"),
    ("router.weight",),
    ("experts.gate_up_proj", "experts.down_proj"),
)
# method -> adapted module of a layer, what is saved there
PLACES = {
    "perft-r": ("mlp", LOW_RANK + ROUTED),
    "perft-r-bottleneck": ("mlp", LOW_RANK + ROUTED),
    "perft-d": ("mlp", LOW_RANK),
    "perft-s": ("mlp", LOW_RANK),
    "perft-e": ("mlp.experts", LOW_RANK),
    "esft": ("mlp.experts", SLICES),
    "esft-lora": ("mlp.experts", LOW_RANK),
    "mov": ("self_attn.k_proj", ("experts.vectors", "router.weight")),
}


@pytest.fixture
def base():
    return tiny_olmoe().eval().requires_grad_(False)


@pytest.fixture
def batch():
    return padded_batch([7, 5, 7])


def config_of(method, **overrides):
    return METHODS[method](task_type="CAUSAL_LM", **overrides)


def adapt(base, config):
    model = get_peft_model(copy.deepcopy(base), config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("method", PLACES)
def test_state_keys_are_module_prefix_attribute_and_parameter(base, tmp_path, method):
    model = adapt(base, config_of(method))
    prefix = model.base_model.prefix
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    place, endings = PLACES[method]
    wanted = {f"base_model.model.model.layers.1.{place}.{prefix}{ending}" for ending in endings}
    assert {key for key in keys if f"layers.1.{place}.{prefix}" in key} == wanted
    assert all(f".{prefix}" in key for key in keys)
    in_model = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".default." in name and ".lora_" not in name and name.count(prefix) == 1 for name in in_model)


@pytest.mark.parametrize("build", [tiny_olmoe, tiny_deepseek_v2])
@pytest.mark.parametrize("method", PLACES)
def test_transformers_integration_adds_saves_loads_and_deletes(build, batch, tmp_path, method):
    base = build().eval().requires_grad_(False)
    expected_base = base(**batch).logits
    model = copy.deepcopy(base)
    model.add_adapter(config_of(method), adapter_name="first")
    randomize(model)
    expected = model(**batch).logits
    assert not torch.allclose(expected, expected_base)
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path), adapter_name="again")
    assert torch.equal(loaded(**batch).logits, expected)
    loaded.disable_adapters()
    assert torch.equal(loaded(**batch).logits, expected_base)
    loaded.enable_adapters()
    assert torch.equal(loaded(**batch).logits, expected)
    loaded.add_adapter(config_of(method), adapter_name="second")
    loaded.set_adapter("second")
    assert torch.equal(loaded(**batch).logits, expected_base)
    loaded.delete_adapter("second")
    loaded.set_adapter("again")
    assert torch.equal(loaded(**batch).logits, expected)


@pytest.mark.parametrize("method", ["perft-r", "perft-e", "esft", "esft-lora", "mov"])
def test_auto_classes_load_base_and_adapter_from_folders(base, batch, tmp_path, method):
    base.save_pretrained(tmp_path / "base")
    reference = type(base).from_pretrained(tmp_path / "base").eval()
    expected_base = reference(**batch).logits
    model = adapt(reference, config_of(method))
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-6)  # another experts implementation
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(**batch).logits, expected_base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", ["perft-r", "perft-e", "esft", "mov"])
def test_another_adapter_type_and_stock_lora_stand_beside_each_other(base, batch, tmp_path, first):
    one = adapt(base, config_of(first))
    one.save_pretrained(tmp_path / "first")
    alone = one(**batch).logits
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    both = PeftModel.from_pretrained(lora.eval().merge_and_unload(), tmp_path / "first").eval()
    assert not torch.allclose(both(**batch).logits, alone)
    model = copy.deepcopy(base)
    model.load_adapter(str(tmp_path / "first"), adapter_name="ours")
    assert torch.equal(model(**batch).logits, alone)
    model.load_adapter(str(tmp_path / "lora"), adapter_name="lora")
    model.set_adapter(["ours", "lora"])
    torch.testing.assert_close(model(**batch).logits, both(**batch).logits, rtol=1e-4, atol=1e-5)


def test_routed_experts_stand_on_the_attention_below_adapted_blocks(base, batch):
    attention = LoraMoeConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], num_experts=2)
    model = get_peft_model(copy.deepcopy(base), attention)
    with pytest.raises(ValueError, match="peft"):
        model.add_adapter("blocks", PerftConfig(task_type="CAUSAL_LM"))
    inner = copy.deepcopy(base)
    inner.add_adapter(attention, adapter_name="attention")
    inner.add_adapter(PerftConfig(task_type="CAUSAL_LM", num_experts=2), adapter_name="blocks")
    inner.set_adapter(["attention", "blocks"])
    randomize(inner)
    assert not torch.allclose(inner(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "perft-r",
            "perft-e",
            r"model.layers.0.mlp.experts, one of the \d modules .*, lies inside model.layers.0.mlp, which an adapter",
        ),
        ("perft-e", "perft-r", r"mlp contains layers with adapters of their own \(experts\)"),
    ],
)
def test_a_block_and_its_experts_cannot_both_be_wrapped(base, batch, first, second, message):
    model = adapt(base, config_of(first))
    expected = model(**batch).logits
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config_of(second))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("method", ["perft-r", "perft-e", "perft-d"])
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_a_branch_beside_a_block_is_refused_before_anything_changes(base, batch, method, merge):
    model = adapt(base, config_of(method))
    expected = model(**batch).logits
    with pytest.raises(ValueError, match=r"depends on the input of .*cannot be merged"):
        getattr(model, merge)()
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("config", [MovConfig(), PerftConfig(), RoutedConfig(wraps="block")], ids=lambda c: c.method)
def test_layers_to_transform_and_exclusions_choose_among_the_default_places(base, config):
    config.layers_to_transform = [1]
    model = get_peft_model(base, config)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(".layers.1." in name for name in names)
