"""Selections live and go with their adapters, on the layers around a backbone's experts alone."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from moe_peft import EsftConfig, RoutedConfig, routed_layers
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama


@pytest.mark.parametrize("expert_adapter", ["full", "lora"])
def test_a_selection_is_kept_by_adapter_and_goes_with_it(expert_adapter):
    model = get_peft_model(tiny_olmoe(), EsftConfig(experts={"1": [1, 3]}, expert_adapter=expert_adapter))
    model.add_adapter("other", EsftConfig(experts={"1": [0]}, expert_adapter=expert_adapter))
    (layer,) = routed_layers(model)
    assert {name: list(own) for name, own in layer.selections.items()} == {"default": [1, 3], "other": [0]}
    model.delete_adapter("other")
    assert set(layer.selections) == {"default"} == set(layer.experts)


def test_other_layers_know_of_no_selection():
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=3))
    assert not any("selection" in name for layer in routed_layers(model) for name in vars(layer))
