"""What no adapter can do on a backbone is refused with the reason and the way out, before a weight changes."""

from __future__ import annotations

import copy

import pytest
from peft import get_peft_model
from torch import nn

from moe_peft import EsftConfig, PerftConfig, RoutedConfig
from moe_peft.backbone.structure import find_moe_layers
from tests.backbones.cases import base_model, marked
from tests.backbones.models import NO_SLICES, OPAQUE
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama

FOLLOWERS = {
    "perft-e": PerftConfig(variant="E", r=2),
    "esft": EsftConfig(experts={"0": [1]}),
    "esft-lora": EsftConfig(experts={"0": [1]}, expert_adapter="lora", r=2),
}


def refused(model: nn.Module, config, match: str) -> None:
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, copy.deepcopy(config))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("model_type", OPAQUE)
def test_adapters_that_follow_experts_are_refused_where_nobody_can(model_type):
    model = copy.deepcopy(base_model(model_type))
    for config in FOLLOWERS.values():
        refused(model, config, f"{OPAQUE[model_type]}.*Use an adapter with a router of its own")


@pytest.mark.parametrize("method", FOLLOWERS)
def test_dense_models_are_refused_as_such(method):
    refused(tiny_llama(), FOLLOWERS[method], "no experts module that an adapter can follow: it is a dense model")


@pytest.mark.parametrize("model_type", [marked(model_type) for model_type in NO_SLICES])
def test_whole_matrices_of_experts_without_slices_are_refused(model_type):
    match = r"expert_adapter='full' must be 'lora'.*one slice"
    refused(copy.deepcopy(base_model(model_type)), FOLLOWERS["esft"], match)


@pytest.mark.parametrize("method", FOLLOWERS)
def test_experts_that_are_split_over_processes_are_refused(method):
    model = tiny_olmoe()
    for layer in find_moe_layers(model):
        model.get_submodule(layer.experts)._is_expert_parallel = True
    refused(model, FOLLOWERS[method], "split over processes")


def test_one_layer_index_for_two_experts_modules_is_refused():
    model = nn.ModuleDict({"thinker": tiny_olmoe(), "talker": tiny_olmoe()})
    match = "thinker.model.layers.0.mlp.experts and talker.model.layers.0.mlp.experts both belong to layer 0"
    refused(model, FOLLOWERS["esft"], match)


def test_a_router_that_is_named_is_refused():
    match = "belongs to a router of the backbone"
    refused(tiny_olmoe(), RoutedConfig(target_modules=["gate"]), match)
    for model_type, target in (("jetmoe", "layer"), ("llama4_text", "router"), ("dbrx", "layer")):
        refused(copy.deepcopy(base_model(model_type)), RoutedConfig(target_modules=[target]), match)
