"""Which blocks and experts modules an adapter wraps, their widths, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_peft import PerftConfig
from moe_peft.backbone.structure import find_moe_layers
from moe_peft.places.blocks import block_names, block_place, experts_names, experts_place, mlp_features
from moe_peft.places.linear import linear_names
from tests.backbones.models import tiny_model
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5


def blocks(model: nn.Module) -> list[str]:
    return block_names(model, find_moe_layers(model), linear_names(model))


def place(model: nn.Module, name: str):
    return block_place(name, model.get_submodule(name), find_moe_layers(model), {})


def test_dense_models_give_the_mlps_of_their_layers():
    assert blocks(tiny_llama()) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert blocks(tiny_gpt2()) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert blocks(tiny_t5())[0] == "encoder.block.0.layer.1.DenseReluDense"


HYBRIDS = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
}


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_mixers_of_a_dense_hybrid_are_no_mlps(model_type):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, **sizes, **heads, **HYBRIDS[model_type])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert blocks(model) == ["model.layers.0.feed_forward", "model.layers.1.feed_forward"]


def test_a_model_without_a_module_for_its_mlp_is_refused():
    with pytest.raises(ValueError, match="has no block that an adapter can wrap"):
        blocks(tiny_bert())


def test_dense_layers_of_a_sparse_model_are_left_alone():
    model = tiny_model("deepseek_v3", first_k_dense_replace=1)
    assert blocks(model) == ["model.layers.1.mlp"]


def test_blocks_whose_experts_cannot_be_followed_are_blocks():
    model = tiny_model("switch_transformers")
    assert blocks(model) == ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"]
    assert place(model, "encoder.block.1.layer.1.mlp").in_features == 32


def test_experts_stand_for_the_block_where_the_decoder_layer_owns_them():
    model = tiny_model("gemma4_text")
    assert blocks(model) == ["model.layers.0.experts", "model.layers.1.experts"]
    assert place(model, "model.layers.0.experts").in_features == 32


def test_a_block_has_the_width_of_the_hidden_states_and_its_experts_their_own():
    model = tiny_model("nemotron_h")
    layers = find_moe_layers(model)
    block = place(model, "model.layers.1.mixer")
    assert (block.in_features, block.out_features, block.num_experts) == (32, 32, None)
    experts = experts_place(layers[0].experts, model.get_submodule(layers[0].experts), layers, {})
    assert (experts.in_features, experts.out_features, experts.num_experts) == (20, 20, 6)
    assert experts.layer_index == 1 and experts.base is model.get_submodule(layers[0].experts)


def test_a_module_that_changes_the_width_is_no_block():
    model = tiny_llama()
    with pytest.raises(TypeError, match="same width"):
        place(model, "model.layers.0.mlp.up_proj")
    assert mlp_features(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))) == 3
    assert mlp_features(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))) is None
    assert mlp_features(nn.Linear(3, 3)) is None


def test_experts_of_a_dense_model_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"it is a dense model\. Use an adapter with a router of its own"):
        experts_names(tiny_llama(), [])


def test_a_module_that_is_no_experts_module_is_refused_with_those_that_are():
    model = tiny_olmoe()
    layers = find_moe_layers(model)
    with pytest.raises(TypeError, match=r"those are \['model.layers.0.mlp.experts', 'model.layers.1.mlp.experts'\]"):
        experts_place("model.layers.0.mlp", model.get_submodule("model.layers.0.mlp"), layers, {})


def test_names_are_those_of_the_experts_modules():
    with torch.device("meta"):
        model = tiny_olmoe()
    layers = find_moe_layers(model)
    assert experts_names(model, layers) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_a_block_that_an_adapter_wraps_is_still_a_block():
    for base in (tiny_llama(), tiny_olmoe(), tiny_model("jetmoe")):
        expected = blocks(base)
        model = get_peft_model(base, PerftConfig(variant="S", r=2)).base_model.model
        assert blocks(model) == expected
