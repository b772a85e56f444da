"""Dense routing weighs every expert by its softmax probability."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import DenseRouter
from moe_peft.types import TokenContext
from tests import reference
from tests.compare import assert_same


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_weights_are_the_softmax_of_the_scores_times_the_factor(num_tokens, num_experts, factor):
    torch.manual_seed(0)
    router = DenseRouter(7, num_experts, routed_scaling_factor=factor).double()
    x = torch.randn(num_tokens, 7, dtype=torch.float64, requires_grad=True)
    routing = router(x, TokenContext())
    expected = factor * torch.stack([torch.stack(row) for row in reference.router_probs(x, router.weight)])
    assert routing.experts is None and routing.dropped is None
    assert_same(routing.gate_matrix(), expected, [x, router.weight], [x, router.weight])


def test_probabilities_do_not_carry_the_factor():
    router = DenseRouter(7, 4, routed_scaling_factor=2.5)
    routing = router(torch.randn(13, 7), TokenContext())
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(13))
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((13,), 2.5))


def test_zero_router_weighs_all_experts_alike():
    router = DenseRouter(7, 4)
    torch.nn.init.zeros_(router.weight)
    assert torch.equal(router(torch.randn(13, 7), TokenContext()).weights, torch.full((13, 4), 0.25))


def test_dropped_gate_is_zero_and_gets_no_gradient():
    torch.manual_seed(0)
    router = DenseRouter(7, 4, expert_dropout=0.5)
    routing = router(torch.randn(13, 7), TokenContext(training=True))
    assert (routing.weights == 0).any() and (routing.weights != 0).any()
    (grad,) = torch.autograd.grad(routing.weights[routing.weights == 0].sum(), [router.weight])
    assert grad.eq(0).all()
