"""The eager op is the definition: it must equal the formula, forward and gradient."""

from __future__ import annotations

import pytest
import torch

from moe_peft.ops import eager_experts
from tests import reference
from tests.compare import assert_same, gates_of, random_routing

D, OUT, R = 7, 5, 3


def leaves(num_tokens, num_experts, seed=1):
    torch.manual_seed(seed)
    shapes = [(num_tokens, D), (num_experts, R, D), (num_experts, R, OUT), (OUT, D)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("num_tokens", [0, 1, 13, 63])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, None), (4, None), (4, 1), (4, 2), (4, 4)])
def test_equals_the_sum_over_tokens_and_experts(num_tokens, num_experts, top_k):
    x, A, B, W0 = leaves(num_tokens, num_experts)
    routing = random_routing(num_tokens, num_experts, top_k)
    actual = eager_experts(x, x @ W0.T, A, B, routing, scaling=1.7)
    expected = reference.routed_layer(x, W0, A, B.mT, gates_of(routing), scaling=1.7)
    assert_same(actual, expected, [x, A, B, W0, routing.logits], [x, A, B, W0, routing.logits])


def test_expert_without_tokens_gets_zero_gradient_and_changes_nothing():
    x, A, B, W0 = leaves(13, 4)
    routing = random_routing(13, 4, 2, unused=2)
    out = eager_experts(x, x @ W0.T, A, B, routing, scaling=1.0)
    grad_A, grad_B = torch.autograd.grad(out.square().sum(), [A, B])
    assert grad_A[2].eq(0).all() and grad_B[2].eq(0).all()
    assert grad_A[[0, 1, 3]].abs().amax((1, 2)).gt(0).all()
    moved = A.detach().clone()
    moved[2] += 100.0
    assert torch.equal(eager_experts(x, x @ W0.T, moved, B, routing, scaling=1.0), out)


def test_slot_without_an_expert_adds_nothing():
    x, A, B, W0 = leaves(3, 4)
    routing = random_routing(3, 4, 2)
    experts = routing.experts.clone()
    experts[1] = 4
    base = x @ W0.T
    routing = type(routing)(routing.weights, experts, routing.logits, routing.probs)
    out = eager_experts(x, base, A, B, routing, scaling=1.0)
    assert torch.equal(out[1], base[1])
    assert not torch.equal(out[0], base[0])


def test_base_output_is_not_overwritten():
    x, A, B, W0 = leaves(3, 4)
    base = (x @ W0.T).detach()
    before = base.clone()
    eager_experts(x, base, A, B, random_routing(3, 4), scaling=1.0, in_place=True)
    assert torch.equal(base, before)
