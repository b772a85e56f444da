"""What merging asks of routers and base layers."""

from __future__ import annotations

import pytest
import torch

from moe_peft.layers.constant_weights import check_constant, constant_weights
from moe_peft.routers import ConstantRouter, DenseRouter, TopKRouter


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
