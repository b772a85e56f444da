"""The tensors that an adapter will have are those that it has, by names without wrappers, at no cost of memory."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import EsftConfig, MovConfig, PerftConfig, RoutedConfig
from moe_peft.places.choose import find_places, resolve_targets
from moe_peft.tuner.tensors import further_tensors, named_tensors, plain_name, planned_tensors, present_tensors
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama

CONFIGS = {
    "linear": (tiny_llama, RoutedConfig(num_experts=3, r=2, modules_to_save=["norm"])),
    "scaled": (tiny_llama, MovConfig(num_experts=2)),
    "block": (tiny_olmoe, PerftConfig(num_experts=2, r=2)),
    "experts": (tiny_olmoe, PerftConfig(variant="E", r=2)),
    "slices": (tiny_olmoe, EsftConfig(experts={"0": [1], "1": [0, 2]}, train_router=True)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_planned_is_what_is_there(case):
    build, config = CONFIGS[case]
    base, resolved = build(), copy.deepcopy(config)
    resolve_targets(base, resolved)
    prefix = f"{config.adapter_type.lower()}_"
    state = torch.random.get_rng_state()
    planned = planned_tensors(resolved, prefix, find_places(base, resolved))
    assert torch.equal(state, torch.random.get_rng_state())
    further = further_tensors(base, resolved)
    model = get_peft_model(base, copy.deepcopy(config), adapter_name="a")
    assert planned == present_tensors(model, prefix, "a") and planned
    assert further == further_tensors(model, model.peft_config["a"]) and bool(further) == (
        case in ("linear", "slices")
    )
    assert named_tensors(model, prefix, "a").keys() <= model.state_dict().keys()
    assert not present_tensors(model, prefix, "b")


def test_planning_asks_for_no_memory():
    base, config = tiny_olmoe(), PerftConfig(variant="E", r=60_000)
    resolve_targets(base, config)
    planned = planned_tensors(config, "perft_", find_places(base, config))
    assert planned["model.layers.0.mlp.experts.perft_experts.A"] == (4, 60_000, 32)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.a.b", "a.b"),
        ("a._checkpoint_wrapped_module._orig_mod.b.weight", "a.b.weight"),
        ("a._fsdp_wrapped_module", "a"),
        ("a.my_orig_mod.b", "a.my_orig_mod.b"),
        ("module.a", "module.a"),
    ],
)
def test_names_lose_wrappers_alone(name, plain):
    assert plain_name(name) == plain


def test_a_module_that_is_saved_whole_is_looked_for_outside_of_adapters():
    model = nn.ModuleDict({"norm": nn.LayerNorm(2), "other": nn.Linear(2, 2)})
    assert set(further_tensors(model, RoutedConfig(modules_to_save=["norm"]))) == {"norm.weight", "norm.bias"}
