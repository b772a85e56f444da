"""Places: the paper's layers by structure, all-linear without routers, and refusals that name the way out."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_peft import LoraMoeConfig, MoePeftWarning, MoloraConfig, MovConfig, PerftConfig, describe
from moe_peft.layers import RoutedLayer
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5


def test_matching_a_router_is_refused(tmp_path):
    model = get_phimoe()
    before = set(dict(model.named_modules()))
    with pytest.raises(ValueError, match="belongs to a router of the backbone"):
        get_peft_model(model, LoraMoeConfig(target_modules=r".*\.router"))
    assert set(dict(model.named_modules())) == before


def get_phimoe():
    config = AutoConfig.for_model(
        "phimoe",
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        num_local_experts=4,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def test_missing_targets_name_the_nearest_and_all_valid_names():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"not found in the base model. Nearest names: .*'down_proj'") as error:
        get_peft_model(model, LoraMoeConfig(target_modules=["down_prj"]))
    assert "'gate_proj'" in str(error.value)
    with pytest.raises(ValueError, match=r"in the layers \[7\]"):
        describe(model, LoraMoeConfig(target_modules=["down_proj"], layers_to_transform=[7]))


def test_models_outside_transformers_need_target_modules():
    with pytest.raises(ValueError, match="Please specify `target_modules` in MoloraConfig"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), MoloraConfig())


def test_modules_that_are_no_linear_layer_are_refused():
    with pytest.raises(TypeError, match=r"embed_tokens \(Embedding\) is not supported"):
        get_peft_model(tiny_llama(), LoraMoeConfig(target_modules=["embed_tokens"]))
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="adapter there would have no effect"):
        get_peft_model(attention, LoraMoeConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("layers", [0, [0], [1]])
def test_layers_to_transform_limits_the_places(layers):
    config = LoraMoeConfig(target_modules=["down_proj"], layers_to_transform=layers)
    wanted = [layers] if isinstance(layers, int) else layers
    assert [p.name for p in describe(tiny_llama(), config).places] == [
        f"model.layers.{layer}.mlp.down_proj" for layer in wanted
    ]


def test_exclude_modules_are_left_out():
    config = LoraMoeConfig(exclude_modules=["up_proj"])
    assert not any("up_proj" in place.name for place in describe(tiny_llama(), config).places)


@pytest.mark.parametrize("layers", [None, [1]])
def test_blocks_that_an_adapter_wraps_are_found_for_the_next_one(layers):
    for build in (tiny_llama, tiny_gpt2, tiny_t5):
        names = [place.name for place in describe(build(), PerftConfig()).places]
        model = get_peft_model(build(), PerftConfig(layers_to_transform=layers))
        model.add_adapter("second", PerftConfig())
        wrapped = [(n, m) for n, m in model.base_model.model.named_modules() if isinstance(m, RoutedLayer)]
        assert [name for name, module in wrapped if "second" in module.experts] == names


@pytest.mark.parametrize("config_cls", [LoraMoeConfig, MovConfig])
def test_all_linear_keeps_to_the_layers_that_are_chosen(config_cls):
    config = config_cls(target_modules="all-linear", layers_to_transform=[1])
    names = [place.name for place in describe(tiny_llama(), config).places]
    assert len(names) == 7 and all(name.startswith("model.layers.1.") for name in names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": r".*\.mlp", "layers_to_transform": [0]},
            r"layers_to_transform=\[0\] has no effect on target_modules='.*mlp', a regex.*Write the layers into it",
        ),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' has no effect without layers_to_transform; set both"),
        ({"layers_to_transform": []}, r"layers_to_transform=\[\] names no layer. Write None for all layers"),
    ],
)
def test_a_choice_of_layers_without_effect_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        describe(tiny_llama(), PerftConfig(**fields))


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (tiny_mixtral, PerftConfig(target_modules=["block_sparse_moe"]), r"Blocks of Mixtral\w+ are called \['mlp'\]"),
        (
            tiny_mixtral,
            PerftConfig(variant="E", target_modules=["expert"]),
            r"Nearest names: \['experts'\]. Experts mod",
        ),
        (
            tiny_llama,
            PerftConfig(layers_to_transform=[7]),
            r"in the layers \[7\] \(layers_to_transform; layers_pattern says which list.*\['mlp'\]",
        ),
    ],
)
def test_missing_blocks_and_experts_name_those_that_are_there(build, config, message):
    with pytest.raises(ValueError, match=f"{message}.*Leave target_modules None to take them all"):
        describe(build(), config)


def test_a_part_of_a_wrapped_block_cannot_be_trained_in_full_beside_it():
    model = tiny_mixtral()
    before = set(dict(model.named_modules()))
    with pytest.raises(ValueError, match=r"matches model.layers.0.mlp.gate, which lies inside .*the experts alone"):
        get_peft_model(model, PerftConfig(modules_to_save=["gate"]))
    assert set(dict(model.named_modules())) == before
    beside = get_peft_model(model, PerftConfig(variant="E", modules_to_save=["gate"]))
    assert beside.get_submodule(
        "base_model.model.model.layers.1.mlp.gate.modules_to_save.default"
    ).weight.requires_grad


def test_a_target_that_no_module_is_called_is_warned_of_where_others_match():
    config = LoraMoeConfig(target_modules=["q_proj", "gate_porj"])
    with pytest.warns(MoePeftWarning, match=r"names \['gate_porj'\], but no module of the model is called so"):
        assert {place.name[-6:] for place in describe(tiny_llama(), config).places} == {"q_proj"}
