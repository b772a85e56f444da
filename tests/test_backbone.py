"""Routers of a backbone are found by their place, not by their class."""

from __future__ import annotations

from torch import nn

from moe_peft.backbone import is_below, router_names
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama


def test_a_gate_is_a_router_only_beside_experts():
    block = nn.Module()
    block.gate, block.experts, block.shared_expert_gate = nn.Linear(4, 2), nn.Identity(), nn.Linear(4, 1)
    model = nn.ModuleDict({"moe": block, "mlp": nn.ModuleDict({"gate": nn.Linear(4, 4)})})
    assert router_names(model) == {"moe.gate", "moe.shared_expert_gate"}


def test_a_module_called_router_is_one_anywhere():
    model = nn.ModuleDict({"router": nn.Sequential(nn.Linear(4, 2)), "proj": nn.Linear(4, 4)})
    assert router_names(model) == {"router"}
    assert is_below("router.0", {"router"}) and not is_below("router_proj", {"router"})


def test_dense_backbones_have_none_and_sparse_ones_one_per_block():
    assert router_names(tiny_llama()) == set()
    assert router_names(tiny_olmoe()) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
