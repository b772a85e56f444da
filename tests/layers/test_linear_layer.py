"""What acts in a call of a layer around a linear one: the active adapters, those of the rows, or none."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import LoraMoeConfig, MovConfig, routed_layers
from tests.contract.cases import randomize
from tests.layers.test_routed_linear import layer_of
from tests.tiny import tiny_llama

KINDS = {
    "adds": lambda: LoraMoeConfig(target_modules=["v_proj"], num_experts=1),
    "scales": lambda: MovConfig(target_modules=["v_proj"], num_experts=1),
}


def first_layer(kind: str):
    """The first layer of an adapter that can be merged, with random weights, in float64 and evaluation."""
    model = get_peft_model(tiny_llama(), KINDS[kind]()).double().eval()
    randomize(model)
    return routed_layers(model)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_what_its_adapter_gives_alone_and_base_rows_have_the_base(kind):
    layer = first_layer(kind)
    x = torch.randn(3, 4, layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        alone, base = layer(x), layer.base_layer(x)
        mixed = layer(x, adapter_names=["default", "__base__", "elsewhere"])
    assert not torch.allclose(alone, base)
    torch.testing.assert_close(mixed, torch.stack([alone[0], base[1], base[2]]))


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapters_leave_the_base_alone_and_merged_ones_come_out_first(kind):
    layer = first_layer(kind)
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    base, weight = layer.base_layer(x), layer.base_layer.weight.clone()
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base)
    torch.testing.assert_close(layer.base_layer.weight, weight)
    assert not layer.merged


def test_adapter_names_are_refused_on_merged_layers():
    layer = layer_of(nn.Linear(12, 8), LoraMoeConfig(target_modules=["0"], num_experts=1))
    layer.merge()
    with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
        layer(torch.randn(2, 12), adapter_names=["default", "__base__"])
