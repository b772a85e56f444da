"""Names, neighbours and kinds that an adapter cannot have: refused, with nothing lost. Tensors: test_adapter_files."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from moe_peft import EsftConfig, MoloraConfig, PerftConfig
from moe_peft.layers import RoutedLayer
from tests.contract.cases import METHODS, tiny_olmoe
from tests.tiny import tiny_llama


@pytest.fixture
def base():
    return tiny_olmoe().eval().requires_grad_(False)


def test_adapters_of_two_kinds_at_one_place_are_refused_and_nothing_is_lost(base):
    model = get_peft_model(base, EsftConfig(task_type="CAUSAL_LM", experts={"1": [0, 2]}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    low_rank = EsftConfig(task_type="CAUSAL_LM", experts={"1": [0, 2]}, expert_adapter="lora")
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts has an adapter of another kind.*model of its own"):
        model.add_adapter("low-rank", low_rank)
    assert list(model.peft_config) == ["default"]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["0", "mlp", "model", "perft_router", "A"])
def test_a_name_by_which_saving_would_lose_weights_is_refused(base, name):
    with pytest.raises(ValueError, match=f"adapter_name='{name}' is a part of the names .* Take another name, as 'ad"):
        get_peft_model(copy.deepcopy(base), PerftConfig(), adapter_name=name)
    model = get_peft_model(copy.deepcopy(base), PerftConfig())
    with pytest.raises(ValueError, match="is a part of the names"):
        model.add_adapter(name, model.peft_config["default"])
    assert list(model.peft_config) == ["default"]
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    assert len(layers) == 2 and all(list(layer.experts) == ["default"] for layer in layers)
    model.add_adapter(f"adapter_{name}", PerftConfig())


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize(
    "key",
    [
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.base_layer.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ],
)
def test_weights_of_the_base_are_no_part_of_an_adapters_state_dict(key, prefix):
    model = get_peft_model(tiny_llama(), MoloraConfig(num_experts=2, r=2, target_modules=["up_proj"]))
    tensors = get_peft_model_state_dict(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    foreign = {f"{prefix}{key}": torch.zeros_like(before[f"base_model.model.{key}"])}
    with pytest.raises(ValueError, match=f"{key}.*is a weight of the base model"):
        set_peft_model_state_dict(model, {**tensors, **foreign})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def nan(tensors, key):
    tensors[key] = torch.full_like(tensors[key], float("nan"))


def infinite(tensors, key):
    tensors[key].view(-1)[-1] = -float("inf")


def integers(tensors, key):
    tensors[key] = tensors[key].long()


def complex_numbers(tensors, key):
    tensors[key] = tensors[key].to(torch.complex64)


def meta(tensors, key):
    tensors[key] = tensors[key].to("meta")


def lists(tensors, key):
    tensors[key] = tensors[key].tolist()


def eight_bits(tensors, key):
    nan(tensors, key)
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)


def a_key_of_nothing(tensors, key):
    tensors["base_model.model.nothing.weight"] = tensors[key].clone()


def half(tensors, key):
    del tensors[key]


def wide(tensors, key):
    tensors[key] = torch.zeros(*tensors[key].shape, 2)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (nan, ValueError, "holds NaN or infinite values in 1 tensors: .*{key}"),
        (infinite, ValueError, "holds NaN or infinite values in 1 tensors: .*{key}"),
        (eight_bits, ValueError, "holds NaN or infinite values in 1 tensors: .*{key}"),
        (integers, ValueError, "holds integers or complex numbers in 1 tensors: .*{key}"),
        (complex_numbers, ValueError, "holds integers or complex numbers in 1 tensors: .*{key}"),
        (meta, ValueError, "holds no values .*{key}"),
        (lists, TypeError, "under .*{key}, which is no tensor"),
        (a_key_of_nothing, ValueError, "nothing.weight.*no place"),
        (half, ValueError, "lack 1 of .*{key}"),
        (wide, ValueError, "{key} has the shape"),
    ],
)
@pytest.mark.parametrize("name", ["routed", "mov", "perft-e", "esft", "expert-lora"])
def test_a_state_dict_in_memory_meets_the_checks_of_files(name, damage, error, message):
    model = get_peft_model(tiny_olmoe(), METHODS[name](**({"target_modules": ["q_proj"]} if name == "routed" else {})))
    tensors = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    key = sorted(tensors)[-1]
    damage(tensors, key)
    before = {own: tensor.clone() for own, tensor in model.state_dict().items()}
    plain = model.base_model.model
    for load in (
        lambda: set_peft_model_state_dict(model, tensors),
        lambda: set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True),
        lambda: set_peft_model_state_dict(plain, tensors),
    ):
        with pytest.raises(error, match=message.format(key=key.rpartition(".")[2])):
            load()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[own], value) for own, value in before.items())


def test_modules_trained_in_full_are_checked_in_a_state_dict_too():
    model = get_peft_model(tiny_llama(), MoloraConfig(num_experts=2, r=2, modules_to_save=["norm"]))
    tensors = get_peft_model_state_dict(model)
    key = next(key for key in tensors if key.endswith("norm.weight"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nan(tensors, key)
    with pytest.raises(ValueError, match=r"NaN or infinite values in 1 tensors: .*norm"):
        set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_trained_and_saved_beside_an_adapter_is_part_of_its_state_dict():
    config = MoloraConfig(num_experts=2, r=2, modules_to_save=["norm"], trainable_token_indices=[3])
    model = get_peft_model(tiny_llama(), config)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=True)
    set_peft_model_state_dict(model, {name: torch.ones_like(tensor) for name, tensor in tensors.items()})
    assert all((tensor == 1).all() for tensor in get_peft_model_state_dict(model).values())
