"""The dense op equals the eager one, forward and gradient, on every kind of decision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_peft.ops import (
    IMPLEMENTATIONS,
    add_gated,
    cast_to_compute_dtype,
    combine_experts,
    dense_experts,
    eager_experts,
    project,
)
from moe_peft.ops.choice import FEW_ROWS
from tests.compare import assert_same, random_routing, saved_for_backward

D, OUT, R = 7, 5, 3


def leaves(num_tokens, num_experts, seed=1):
    torch.manual_seed(seed)
    shapes = [(num_tokens, D), (num_experts, R, D), (num_experts, R, OUT), (num_tokens, OUT)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 13, FEW_ROWS + 13])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "unused"),
    [(1, None, None), (1, 1, None), (4, None, None), (4, 1, None), (4, 2, 3), (4, 4, None)],
)
def test_equals_the_eager_op(in_place, num_tokens, num_experts, top_k, unused):
    x, A, B, base = leaves(num_tokens, num_experts)
    routing = random_routing(num_tokens, num_experts, top_k, unused=unused)
    actual = dense_experts(x, base * 1.0, A, B, routing, scaling=0.3, in_place=in_place)
    expected = eager_experts(x, base * 1.0, A, B, routing, scaling=0.3)
    assert_same(actual, expected, [x, A, B, base, routing.logits], [x, A, B, base, routing.logits])


def test_in_place_writes_into_the_base_output():
    x, A, B, base = leaves(13, 4)
    fresh = base * 1.0
    out = dense_experts(x, fresh, A, B, random_routing(13, 4), scaling=1.0, in_place=True)
    assert out.data_ptr() == fresh.data_ptr()


def test_out_of_place_leaves_the_base_output_alone():
    x, A, B, base = leaves(13, 4)
    before = base.detach().clone()
    dense_experts(x, base, A, B, random_routing(13, 4), scaling=1.0)
    assert torch.equal(base, before)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_result_has_the_dtype_of_the_base_output(implementation):
    x, A, B, base = leaves(13, 4)
    routing = random_routing(13, 4)
    op = IMPLEMENTATIONS[implementation]
    exact = op(x, base, A, B, routing, scaling=1.0)
    for in_place in (False, True):
        out = op(x.bfloat16(), base.float(), A, B, routing, scaling=1.0, in_place=in_place)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("num_tokens", [13, FEW_ROWS + 1])
@pytest.mark.parametrize("frozen", range(4))
def test_only_what_trains_gets_a_gradient(frozen, num_tokens):
    x, A, B, base = leaves(num_tokens, 4)
    routing = random_routing(num_tokens, 4)
    own = [x @ A.reshape(-1, D).T, base * 1.0, B, routing.weights]
    own[frozen] = own[frozen].detach()
    assert_same(
        combine_experts(own[0], own[1], own[2], own[3], scaling=0.3),
        eager_up(*own, scaling=0.3),
        [x, base, B, routing.logits],
        [x, base, B, routing.logits],
    )


def eager_up(h, base, B, gates, *, scaling):
    gated = (h.view(len(h), *B.shape[:2]) * gates[..., None]).flatten(1)
    return base + scaling * gated @ B.flatten(0, 1)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_sum_keeps_down_projections_and_gates_alone(in_place):
    x, A, B, base = leaves(FEW_ROWS + 1, 4)
    h, gates = project(x, A.reshape(-1, D)), random_routing(FEW_ROWS + 1, 4).weights
    kept = saved_for_backward(
        lambda: combine_experts(h, base * 1.0, B, gates, scaling=0.3, in_place=in_place), besides=[h, gates, B]
    )
    assert not kept


def test_second_derivatives_exist():
    x, A, B, base = leaves(3, 2)
    gates = random_routing(3, 2).weights.detach().requires_grad_()

    def combined(h, base, B, gates):
        return combine_experts(h, base, B, gates, scaling=0.3)

    assert torch.autograd.gradgradcheck(combined, ((x @ A.flatten(0, 1).T).detach().requires_grad_(), base, B, gates))


@pytest.mark.parametrize("rows", [6, FEW_ROWS + 1])
def test_a_view_of_a_base_output_is_left_alone(rows):
    x, A, B, base = leaves(2 * rows, 4)
    whole = base * 1.0
    before = whole.detach().clone()
    routing = random_routing(rows, 4)
    out = dense_experts(x[:rows], whole[:rows], A, B, routing, scaling=1.0, in_place=True)
    expected = eager_experts(x[:rows], whole[:rows], A, B, routing, scaling=1.0)
    assert_same(out, expected, [x, A, B, base], [x, A, B, base])
    assert torch.equal(whole, before)


def test_one_projection_of_several_matrices_is_each_on_its_own():
    x, A, _, _ = leaves(13, 4)
    router = torch.randn(4, D, dtype=torch.float64)
    out = project(x, A.reshape(-1, D), router)
    torch.testing.assert_close(out, torch.cat([x @ A.reshape(-1, D).T, x @ router.T], dim=1))


def test_all_gates_zero_is_the_base_output():
    x, A, B, base = leaves(13, 4)
    h = project(x, A.reshape(-1, D))
    assert torch.equal(combine_experts(h, base, B, torch.zeros(13, 4), scaling=2.0), base)


def test_compute_dtype_is_that_of_autocast_and_never_narrows_float64():
    x = torch.randn(3, D)
    assert cast_to_compute_dtype(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cast_to_compute_dtype(x).dtype == torch.bfloat16
        assert cast_to_compute_dtype(x.double()).dtype == torch.float64


def test_autocast_does_not_round_inside_the_op():
    x, A, B, base = leaves(13, 4)
    routing = random_routing(13, 4)
    expected = dense_experts(x.float(), base.float(), A.float(), B.float(), routing, scaling=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = dense_experts(x.float(), base.float(), A.float(), B.float(), routing, scaling=1.0)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("act", [None, F.silu])
@pytest.mark.parametrize("num_tokens", [0, 1, 13, 63])
def test_the_sum_by_gates_alone_equals_the_one_of_a_decision(num_tokens, act, in_place):
    x, A, B, base = leaves(num_tokens, 4)
    routing = random_routing(num_tokens, 4, 2, unused=3)
    expected = eager_experts(x, base * 1.0, A, B, routing, scaling=0.3, act=act)
    settings = {"scaling": 0.3, "act": act, "in_place": in_place}
    found = add_gated(x, base * 1.0, A, B, routing.gate_matrix(), **settings)
    assert_same(found, expected, [x, A, B, base, routing.logits], [x, A, B, base, routing.logits])
    with torch.no_grad():
        out = base.clone()
        found = add_gated(x, out, A, B, routing.gate_matrix(), **settings)
    torch.testing.assert_close(found, expected.detach())
    assert (found is out) == in_place and (in_place or torch.equal(out, base))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_sum_by_gates_alone_follows_autocast_and_takes_gates_of_another_dtype(autocast):
    x, A, B, base = (own.detach().float() for own in leaves(13, 4))
    gates = random_routing(13, 4, 2).gate_matrix().detach().float()
    expected = base + 0.3 * torch.einsum("td,erd,te,ero->to", x, A, gates, B)
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = add_gated(x.to(dtype), base.to(dtype), A.to(dtype), B.to(dtype), gates, scaling=0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
