"""PERFT's configuration: parameter counts of full-size backbones, where adapters stand, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moe_peft import PerftConfig, describe
from tests.perft_models import perft_config, sparse_model
from tests.tiny import tiny_bert, tiny_llama

VARIANTS = ("R", "E", "D", "S")


def olmoe_1b_7b() -> nn.Module:
    with torch.device("meta"):
        return OlmoeForCausalLM(
            OlmoeConfig(
                hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_experts=64, num_attention_heads=16
            )
        )


def mixtral_8x7b() -> nn.Module:
    with torch.device("meta"):
        return MixtralForCausalLM(
            MixtralConfig(hidden_size=4096, num_hidden_layers=32, num_local_experts=8, num_attention_heads=32)
        )


@pytest.mark.parametrize(
    ("build", "fields", "expected"),
    [
        (olmoe_1b_7b, {"variant": "S", "r": 4}, 262_144),
        (olmoe_1b_7b, {"variant": "D", "r": 4, "num_experts": 2}, 524_288),
        (olmoe_1b_7b, {"variant": "R", "r": 4, "num_experts": 8}, 2_359_296),
        (olmoe_1b_7b, {"variant": "E", "r": 4}, 16_777_216),
        (mixtral_8x7b, {"variant": "S", "r": 8}, 2_097_152),
        (mixtral_8x7b, {"variant": "R", "r": 8, "num_experts": 8}, 17_825_792),
        (mixtral_8x7b, {"variant": "E", "r": 8}, 16_777_216),
    ],
)
def test_parameters_of_full_size_backbones(build, fields, expected):
    description = describe(build(), PerftConfig(**fields))
    assert description.num_parameters == expected
    assert len(description.places) == (16 if build is olmoe_1b_7b else 32)


@pytest.mark.parametrize("variant", ["R", "D", "S"])
def test_a_dense_model_gets_its_adapters_beside_the_mlps(variant):
    names = [place.name for place in describe(tiny_llama(), perft_config(variant)).places]
    assert names == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_dense_layers_of_a_sparse_model_are_left_alone():
    places = describe(sparse_model("deepseek_v2"), perft_config("R")).places
    assert [place.name for place in places] == ["model.layers.1.mlp"]


def test_models_without_the_place_are_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"no experts module .* a dense model.* Use an adapter with a router of its own"
    ):
        describe(tiny_llama(), perft_config("E"))
    with pytest.raises(ValueError, match="no block that an adapter can wrap"):
        describe(tiny_bert(), perft_config("R"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "X"}, "variant='X' must be one of 'R', 'E', 'D', 'S'"),
        ({"router": "backbone"}, "router='backbone' must be one of .* only adapters around the backbone's experts"),
        ({"router": "constant"}, "router='constant' must be a router that learns, or variant 'E' or 'D'"),
        ({"router": "dense", "router_aux_loss_coef": 0.01}, "with the dense router every adapter takes every token"),
        ({"experts": "vector"}, "experts='vector' must be one of 'low_rank', 'bottleneck'"),
        ({"activation": "gelu"}, "'low_rank' adapters have no activation"),
        ({"experts": "bottleneck", "lora_alpha": 7}, "lora_alpha=7 must be left at None: .* have no scale"),
        ({"experts": "bottleneck", "use_rslora": True}, "use_rslora=True must be left at False: .* have no scale"),
        ({"variant": "E", "num_experts": 4}, "num_experts=4 must be left at None: variant 'E' fixes it"),
        ({"variant": "D", "top_k": 2}, "top_k=2 must be left at"),
        ({"variant": "S", "num_experts": 2}, "num_experts=2 must be left at None: variant 'S' fixes it"),
        ({"variant": "S", "router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 must be left at None"),
        ({"variant": "E", "norm_topk_prob": True}, "norm_topk_prob=True must be left at False"),
        ({"variant": "D", "router_z_loss_coef": 0.1}, "variant 'D' has no router of its own"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
    ],
)
def test_settings_without_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PerftConfig(**fields)


def test_unset_fields_follow_from_the_others():
    assert (perft_config("R").num_experts, perft_config("R").top_k, perft_config("R").router_aux_loss_coef) == (
        4,
        2,
        0.01,
    )
    assert perft_config("R", num_experts=1).top_k == 1
    dense = perft_config("R", router="dense")
    assert (dense.top_k, dense.router_aux_loss_coef) == (None, 0.0)
    assert PerftConfig().scaling == PerftConfig(r=64).scaling == 2.0 and PerftConfig(lora_alpha=16).scaling == 1.0
    assert (perft_config("D").num_experts, perft_config("S").num_experts, perft_config("E").num_experts) == (
        4,
        1,
        None,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_configuration_comes_back_from_its_file(variant, tmp_path):
    perft_config(variant).save_pretrained(tmp_path)
    loaded = PerftConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == perft_config(variant).to_dict()
