"""An exported LoRA equals the adapter, and stock peft loads it; where no LoRA equals it, the way out is named."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, convert_to_lora, save_as_lora
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_peft import (
    EsftConfig,
    ExpertLoraConfig,
    MoloraConfig,
    MovConfig,
    PerftConfig,
    RoutedConfig,
    routed_layers,
)
from moe_peft.tools import export_lora, load_without_base
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import tiny_gpt2, tiny_llama
from tests.tools.exported import BATCH, checkpoint, digest, logits, trained

LAYER = {"scorer": "layer_logits", "router": "dense", "num_experts": 3, "r": 2}
EXACT = {
    "one expert": (tiny_llama, MoloraConfig(num_experts=1, r=3)),
    "rank-stabilised": (tiny_llama, MoloraConfig(num_experts=1, r=3, use_rslora=True)),
    "logits of the layer": (tiny_llama, RoutedConfig(**LAYER)),
    "logits of the block": (tiny_llama, RoutedConfig(**LAYER, router_scope="block")),
    "constant": (tiny_llama, RoutedConfig(router="constant", num_experts=3, r=2)),
    "shared expert": (tiny_llama, RoutedConfig(**LAYER, experts_args={"shared": 1})),
    "diagonal cores": (tiny_llama, RoutedConfig(**LAYER, experts="cp_diagonal")),
    "latent cores": (tiny_llama, RoutedConfig(**LAYER, experts="latent_core")),
    "one down matrix": (tiny_llama, RoutedConfig(**LAYER, experts="shared_down")),
    "sizes by layer": (tiny_llama, RoutedConfig(**LAYER, per_layer={"num_experts": [2, 4]})),
    "transposed layers": (tiny_gpt2, MoloraConfig(num_experts=1, target_modules=["c_attn", "c_fc"])),
    "head and tokens": (
        tiny_llama,
        MoloraConfig(num_experts=1, modules_to_save=["lm_head"], trainable_token_indices=[3, 4]),
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_stock_peft_computes_what_the_adapter_computes(case, tmp_path):
    build, config = EXACT[case]
    model = get_peft_model(build().double(), config).eval()
    randomize(model)
    export_lora(model, tmp_path / "lora")
    stock = PeftModel.from_pretrained(build().double(), tmp_path / "lora").double()
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    names = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert not any(prefix in key for key in names for prefix in ("routed_", "molora_"))


def as_an_engine_reads(folder, model):
    """The base model with the file's pairs in its weights: one rank, one scale, layers by their names."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    named = dict(model.named_modules())
    for key in [own for own in tensors if own.endswith(".lora_A.weight")]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert len(A) == B.shape[1] == config["r"]
        layer = named[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
        change = config["lora_alpha"] / config["r"] * (B.double() @ A.double())
        layer.weight.data += change.T if config["fan_in_fan_out"] else change
    return model


@pytest.mark.parametrize("case", [name for name in EXACT if name != "head and tokens"])
def test_an_engine_that_knows_one_rank_and_one_scale_computes_the_same(case, tmp_path):
    build, config = EXACT[case]
    model = get_peft_model(build().double(), config).eval()
    randomize(model)
    export_lora(model, tmp_path / "lora")
    found = as_an_engine_reads(tmp_path / "lora", build().double())
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-6)


def test_layers_have_short_names_where_those_mean_no_other_layer(tmp_path):
    short = {"target_modules": ["q_proj", "up_proj"], "num_experts": 1}
    for name, fields, expected in (
        ("all", short, ["q_proj", "up_proj"]),
        ("one", {**short, "layers_to_transform": [1]}, ["self_attn.q_proj", "mlp.up_proj"]),
    ):
        model = get_peft_model(tiny_llama(), MoloraConfig(**fields))
        export_lora(model, tmp_path / name)
        found = json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"]
        whole = expected if name == "all" else [f"model.layers.1.{own}" for own in expected]
        assert sorted(found) == sorted(whole)
        stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
        places = {own for own, module in stock.get_base_model().named_modules() if isinstance(module, LoraLayer)}
        assert places == {own.place for own in routed_layers(model)}


def test_it_is_written_from_the_files_without_the_base_models_weights(tmp_path):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    model = trained(base, tmp_path / "adapter", MoloraConfig(num_experts=1, modules_to_save=["lm_head"]))
    before = digest(tmp_path / "adapter")
    export_lora(load_without_base(tmp_path / "adapter"), tmp_path / "lora")
    assert digest(tmp_path / "adapter") == before
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-6)


def test_pairs_on_experts_come_with_what_was_trained_beside_them(tmp_path):
    config = ExpertLoraConfig(r=2, modules_to_save=["lm_head"])
    model = get_peft_model(tiny_olmoe().double(), config).eval()
    randomize(model)
    export_lora(model, tmp_path / "lora")
    stock = PeftModel.from_pretrained(tiny_olmoe().double(), tmp_path / "lora").double()
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-6)


def test_one_task_of_an_adapter_by_task_is_a_lora(tmp_path):
    table = {"scorer": "task_table", "router": "top_k", "top_k": 2, "num_experts": 3, "router_args": {"num_tasks": 2}}
    model = get_peft_model(tiny_llama().double(), RoutedConfig(task_type="CAUSAL_LM", **table)).double().eval()
    randomize(model)
    for task in (0, 1):
        export_lora(model, tmp_path / str(task), task=task)
        stock = PeftModel.from_pretrained(tiny_llama().double(), tmp_path / str(task)).double()
        with torch.no_grad():
            expected = model(**BATCH, task_type=torch.tensor([task, task])).logits
        torch.testing.assert_close(logits(stock), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="task=0"):
        export_lora(model, tmp_path / "none")


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (tiny_llama, MoloraConfig(num_experts=2)),
        (tiny_llama, MovConfig(num_experts=1)),
        (tiny_olmoe, EsftConfig(experts={"1": [1]})),
        (tiny_olmoe, PerftConfig(variant="S")),
    ],
)
def test_what_no_lora_equals_is_refused_with_the_ways_out(build, config, tmp_path):
    model = get_peft_model(build(), config)
    with pytest.raises(ValueError, match=r"export_merged.*distil"):
        export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="No layer holds"):
        export_lora(model, tmp_path / "lora", "other")
    assert not any(tmp_path.iterdir())
    assert not any(layer.supports_lora_conversion("default") for layer in routed_layers(model))


@pytest.mark.parametrize("case", ["one expert", "logits of the layer", "constant", "diagonal cores", "shared expert"])
def test_stock_conversion_to_lora_is_offered_where_it_is_exact(case, tmp_path):
    build, config = EXACT[case]
    model = get_peft_model(build(), config).eval()
    randomize(model)
    assert all(layer.supports_lora_conversion() for layer in routed_layers(model))
    assert not any(layer.supports_lora_conversion("other") for layer in routed_layers(model))
    save_as_lora(tmp_path, model, rank=8)
    stock = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=2e-5)


def test_stock_conversion_to_lora_is_refused_where_it_is_none():
    routed = get_peft_model(tiny_llama(), MoloraConfig(num_experts=2))
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(routed, rank=2)
