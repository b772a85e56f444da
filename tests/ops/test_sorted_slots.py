"""Ops that skip the experts a token does not use equal the eager one, forward and gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from moe_peft.ops import IMPLEMENTATIONS, eager_experts
from tests.compare import assert_same, random_routing

SKIPPING = ["grouped", "segment", "gather"]
D, OUT, R = 7, 5, 3
GRID = [(1, None, None), (1, 1, None), (4, None, None), (4, 1, None), (4, 2, 3), (4, 4, None), (9, 2, 0)]


def leaves(num_tokens, num_experts, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    shapes = [(num_tokens, D), (num_experts, R, D), (num_experts, R, OUT), (num_tokens, OUT)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def with_empty_slots(routing):
    """The same decision without the first slot of every second token, whose weight is kept to be ignored."""
    experts = routing.experts.clone()
    experts[::2, 0] = routing.num_experts
    return replace(routing, experts=experts)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("act", [None, F.silu])
@pytest.mark.parametrize("num_tokens", [0, 1, 13, 63])
@pytest.mark.parametrize(("num_experts", "top_k", "unused"), GRID)
@pytest.mark.parametrize("name", SKIPPING)
def test_equals_the_eager_op_forward_and_gradient(name, num_experts, top_k, unused, num_tokens, act, in_place):
    x, A, B, base = leaves(num_tokens, num_experts)
    routing = random_routing(num_tokens, num_experts, top_k, unused=unused)
    decisions = [routing] if top_k is None else [routing, with_empty_slots(routing)]
    for decision in decisions:
        actual = IMPLEMENTATIONS[name](x, base * 1.0, A, B, decision, scaling=0.3, act=act, in_place=in_place)
        expected = eager_experts(x, base * 1.0, A, B, decision, scaling=0.3, act=act)
        own = [x, A, B, base, routing.logits]
        assert_same(actual, expected, own, own)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("rank", [1, 3, 4, 8])
@pytest.mark.parametrize("widths", [(7, 5), (16, 32), (33, 8)])
@pytest.mark.parametrize("name", SKIPPING)
def test_equals_the_eager_op_in_other_dtypes_ranks_and_widths(name, widths, rank, dtype, tolerance):
    torch.manual_seed(0)
    (d, out), routing = widths, random_routing(13, 6, 2, unused=4)
    shapes = [(13, d), (6, rank, d), (6, rank, out), (13, out)]
    exact = [torch.randn(shape, dtype=torch.float64).to(dtype).double().requires_grad_() for shape in shapes]
    rounded = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    weights, results = torch.randn(13, out, dtype=torch.float64), []
    for op, (x, A, B, base) in ((IMPLEMENTATIONS[name], rounded), (eager_experts, exact)):
        y = op(x, base * 1, A, B, routing, scaling=0.5)
        assert y.dtype == base.dtype
        found = torch.autograd.grad((y.double() * weights).sum(), [x, A, B, base])
        results.append([y.double(), *(g.double() for g in found)])
    for found, expected in zip(*results, strict=True):
        scale = max(expected.abs().max().item(), 1e-3)
        assert (found - expected).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("name", SKIPPING)
def test_every_parameter_gets_a_gradient_where_no_expert_is_used(name):
    x, A, B, base = leaves(3, 4)
    routing = random_routing(3, 4, 2)
    empty = replace(routing, experts=torch.full_like(routing.experts, 4))
    y = IMPLEMENTATIONS[name](x, base, A, B, empty, scaling=1.0)
    assert torch.equal(y, base)
    of_A, of_B = torch.autograd.grad(y.sum(), [A, B])
    assert of_A.eq(0).all() and of_B.eq(0).all()


@pytest.mark.parametrize("name", SKIPPING)
def test_weights_that_are_not_finite_at_other_experts_do_not_matter(name):
    x, A, B, base = leaves(13, 4)
    routing = random_routing(13, 4, 2, unused=3)
    expected = eager_experts(x, base, A, B, routing, scaling=1.0)
    A.data[3] = B.data[3] = float("nan")
    torch.testing.assert_close(IMPLEMENTATIONS[name](x, base, A, B, routing, scaling=1.0), expected)
