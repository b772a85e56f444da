"""The lengths of routers' vectors count what a router trains for an expert, and nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import EsftConfig, RoutedConfig, routed_layers
from moe_peft.layers.router_norms import router_norms
from tests.contract.cases import tiny_olmoe
from tests.tiny import HIDDEN, tiny_llama

PLACES = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": HIDDEN},
        {"num_experts": 3, "router": "null_top_k"},
        {"per_layer": {"num_experts": [2, 3]}},
        {"num_experts": 3, "router": "bias_balanced", "gate": "sigmoid"},
        {"num_experts": 3, "experts": "ffn_lora", "wraps": "block", "target_modules": None},
    ],
)
def test_they_are_those_of_the_rows_of_a_linear_router(fields):
    model = get_peft_model(tiny_llama(), RoutedConfig(**{"r": 2, **PLACES, **fields}))
    found = router_norms(model)
    layers = routed_layers(model)
    assert list(found) == [layer.place for layer in layers]
    for layer in layers:
        rows = layer.router["default"].weight[: layer.experts["default"].num_choices]
        torch.testing.assert_close(found[layer.place], rows.double().norm(dim=1))


def test_routers_without_a_vector_for_each_expert_have_none():
    fields = [{"router": "constant"}, {"scorer": "fixed_random"}, {"scorer": "product_keys", "num_experts": 2}]
    for config in (RoutedConfig(**PLACES, **own) for own in fields):
        assert router_norms(get_peft_model(tiny_llama(), config)) == {}
    model = get_peft_model(tiny_olmoe(), EsftConfig(experts={"1": [1]}))
    assert router_norms(model) == {}
    with pytest.raises(ValueError, match="No layer holds"):
        router_norms(model, "other")
