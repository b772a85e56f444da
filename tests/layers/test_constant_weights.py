"""What merging asks of routers and base layers."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.layers.constant_weights import check_constant, constant_weights
from moe_peft.routers import ConstantRouter, DenseRouter, TopKRouter
from tests.tiny import tiny_llama


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (DenseRouter(6, 1), [1.0]),
        (DenseRouter(6, 1, routed_scaling_factor=2.5), [2.5]),
        (TopKRouter(6, 1, top_k=1), [1.0]),
        (ConstantRouter(6, 3), [1.0, 1.0, 1.0]),
    ],
)
def test_routers_that_promise_the_same_weights_give_them(router, expected):
    assert router.mergeable
    check_constant(router, 6, "default", "linear")
    assert constant_weights(router, 6).tolist() == expected


def test_a_check_leaves_the_random_numbers_of_training_alone():
    state = torch.get_rng_state()
    check_constant(DenseRouter(6, 1), 6, "default", "linear")
    torch.set_rng_state(state)
    before = torch.rand(1)
    torch.set_rng_state(state)
    router = DenseRouter(6, 1)
    torch.set_rng_state(state)
    check_constant(router, 6, "default", "linear")
    assert torch.equal(torch.rand(1), before)


def test_weights_that_differ_between_inputs_are_refused():
    with pytest.raises(ValueError, match=r"'default' depends on the input of linear, although its router"):
        check_constant(DenseRouter(6, 2), 6, "default", "linear")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_router_that_is_broken_is_called_so_and_nothing_is_merged(value):
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=1, r=2, router="dense"))
    layer = next(iter(routed_layers(model)))
    with torch.no_grad():
        layer.router["default"].weight.fill_(value)
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before)
