"""Routers, blocks and experts of a backbone are found by their place and their shapes, not by their class."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moe_peft import PerftConfig, describe
from moe_peft.backbone.structure import (
    block_width,
    find_moe_layers,
    is_below,
    layer_of,
    opaque_blocks,
    router_names,
    unsupported_reason,
)
from moe_peft.places.linear import linear_names
from tests.backbones.models import EXPERTS, FOLLOWED, OPAQUE, TYPES, known, tiny_model
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama, tiny_t5


class Experts(nn.Module):
    """Fused experts as remote code may write them: no flags, 3-D weights, and the three-argument call."""

    def __init__(self, num_experts=3, width=4, inner=5):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.randn(num_experts, width, inner))

    def forward(self, hidden, index, weights):
        return hidden


class SharedExperts(Experts):
    """Always-on experts in the same layout, which nobody routes to."""

    def forward(self, hidden, gammas):
        return hidden


def block_of(experts: nn.Module, name: str = "experts", **siblings: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({name: experts, **siblings})})])}
    )


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
    assert find_moe_layers(tiny_llama()) == [] and opaque_blocks(tiny_llama()) == {}
    assert unsupported_reason(tiny_llama()) is None and unsupported_reason(tiny_olmoe()) is None


@pytest.mark.parametrize("model_type", TYPES)
def test_no_linear_layer_that_writes_one_number_per_expert_can_be_adapted(model_type):
    if not known(model_type):
        pytest.skip(f"the installed transformers has no {model_type}")
    model = tiny_model(model_type)
    linears = linear_names(model)
    assert linears
    # With the skip class of zaya, the identity experts of longcat_flash, and the gate of shared experts.
    writes = (1, EXPERTS, EXPERTS + 1, EXPERTS + 3)
    modules = dict(model.named_modules())
    assert not [name for name in linears if modules[name].out_features in writes]
    assert not [name for name in linears if hasattr(modules[name], "n_groups")]


@pytest.mark.parametrize("model_type", FOLLOWED)
def test_every_layer_of_a_followed_type_is_found_with_its_number_of_experts(model_type):
    if not known(model_type):
        pytest.skip(f"the installed transformers has no {model_type}")
    model = tiny_model(model_type)
    layers = find_moe_layers(model)
    assert len(layers) == 2 and opaque_blocks(model) == {} and unsupported_reason(model) is None
    for layer in layers:
        assert layer.num_experts == EXPERTS
        assert f".{layer.index}." in layer.experts
        assert layer.in_features == layer.out_features == (20 if model_type == "nemotron_h" else 32)
        assert layer.router in router_names(model)
        assert (layer.block is None) == (model_type == "gemma4_text")
        assert layer.block is None or block_width(model.get_submodule(layer.block)) == 32


@pytest.mark.parametrize("model_type", OPAQUE)
def test_blocks_that_no_adapter_can_follow_are_named_with_the_reason(model_type):
    model = tiny_model(model_type)
    assert find_moe_layers(model) == []
    blocks = opaque_blocks(model)
    assert len(blocks) == 2 and all(OPAQUE[model_type] in reason for reason in blocks.values())
    for name in blocks:
        assert block_width(model.get_submodule(name)) == 32
    with pytest.raises(ValueError, match=OPAQUE[model_type]):
        describe(model, PerftConfig(variant="E"))


def test_experts_without_flags_are_told_by_their_call_and_weights():
    (layer,) = find_moe_layers(block_of(Experts(), name="mixture", gate=nn.Linear(4, 3)))
    assert layer.experts == "layers.0.mlp.mixture" and layer.block == "layers.0.mlp"
    assert (layer.num_experts, layer.in_features, layer.out_features) == (3, 4, 4)


def test_always_on_experts_are_no_experts_module_but_shared_experts():
    assert find_moe_layers(block_of(SharedExperts(), name="always")) == []
    (layer,) = find_moe_layers(block_of(Experts(), shared_experts=Experts(), shared_expert_gate=nn.Linear(4, 1)))
    assert layer.shared_experts == ("layers.0.mlp.shared_experts",)


def test_transposed_weights_give_their_own_widths():
    experts = Experts()
    experts.is_transposed = True
    experts.gate_up_proj.data, experts.down_proj.data = torch.randn(3, 4, 10), torch.randn(3, 5, 7)
    (layer,) = find_moe_layers(block_of(experts))
    assert (layer.in_features, layer.out_features) == (4, 7)


def test_experts_beyond_the_last_matrix_are_identities():
    experts = Experts()
    experts.gate_up_proj.data = torch.randn(5, 10, 4)
    assert find_moe_layers(block_of(experts))[0].num_experts == 3


def test_a_meta_model_has_the_same_layers():
    model = tiny_olmoe()
    assert find_moe_layers(copy.deepcopy(model).to("meta")) == find_moe_layers(model)


@pytest.mark.parametrize(
    "config",
    [
        PerftConfig(variant="S", r=2),
        PerftConfig(variant="E", r=2),
        LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ],
    ids=["block", "experts", "parameters"],
)
def test_peft_layers_around_blocks_and_experts_are_seen_through(config):
    base = tiny_olmoe()
    model = get_peft_model(copy.deepcopy(base), config).base_model.model
    for found, expected in zip(find_moe_layers(model), find_moe_layers(base), strict=True):
        assert found.experts.replace(".base_layer", "") == expected.experts
        assert (found.block, found.num_experts, found.in_features) == (expected.block, EXPERTS_OF_OLMOE, 32)
    assert {name.replace(".base_layer", "") for name in router_names(model)} == router_names(base)


EXPERTS_OF_OLMOE = 4


def test_packed_experts_are_found_without_unpacking_them(monkeypatch):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = tiny_olmoe()
    expected = find_moe_layers(model)
    for layer in expected:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(model.get_submodule(layer.experts), name)
    monkeypatch.setattr(parametrize.Bnb4bitParametrization, "forward", lambda *args: pytest.fail("unpacked"))
    assert find_moe_layers(model) == expected


def test_layers_are_counted_in_their_own_stack():
    modules = dict(tiny_t5().named_modules())
    assert layer_of("encoder.block.1.layer.0.SelfAttention.q", modules) == (1, 2)
    assert layer_of("decoder.block.0.layer.2.DenseReluDense.wo", modules) == (0, 2)
    assert layer_of("lm_head", modules) is None
