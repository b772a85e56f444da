"""Top-k routing keeps the k largest probabilities of each token."""

from __future__ import annotations

import pytest
import torch

from moe_peft.extend import Capacity, LinearRouter, TopK
from moe_peft.routers import DenseRouter, TopKRouter
from moe_peft.routers.bias_balanced import BiasBalanced
from moe_peft.routers.null_top_k import NullTopK
from moe_peft.types import TokenContext
from tests import reference
from tests.compare import assert_same

TRAINING = TokenContext(training=True)


def as_matrix(gates, num_experts):
    rows = [[row.get(e, torch.zeros((), dtype=torch.float64)) for e in range(num_experts)] for row in gates]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 1), (5, 2), (5, 5)])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_equals_the_reference(num_tokens, num_experts, top_k, normalise, factor):
    torch.manual_seed(0)
    router = TopKRouter(7, num_experts, top_k=top_k, norm_topk_prob=normalise, routed_scaling_factor=factor).double()
    x = torch.randn(num_tokens, 7, dtype=torch.float64, requires_grad=True)
    routing = router(x, TokenContext())
    gates, chosen = reference.top_k_gates(
        reference.router_probs(x, router.weight), top_k, normalise=normalise, factor=factor
    )
    assert routing.experts.tolist() == chosen
    expected = as_matrix(gates, num_experts)
    assert_same(routing.gate_matrix(), expected, [x, router.weight], [x, router.weight])


def test_full_k_equals_dense_routing():
    torch.manual_seed(0)
    sparse, dense = TopKRouter(7, 4, top_k=4), DenseRouter(7, 4)
    dense.weight = sparse.weight
    x = torch.randn(13, 7)
    assert torch.equal(sparse(x, TokenContext()).gate_matrix(), dense(x, TokenContext()).gate_matrix())


def test_kept_weights_are_not_rescaled_by_default():
    router = TopKRouter(7, 4, top_k=2)
    routing = router(torch.randn(13, 7), TokenContext())
    assert routing.weights.sum(-1).lt(1).all()
    torch.testing.assert_close(routing.weights, routing.probs.gather(1, routing.experts))


def test_normalised_single_choice_is_one_and_gives_the_router_no_gradient():
    router = TopKRouter(7, 4, top_k=1, norm_topk_prob=True).double()
    routing = router(torch.randn(13, 7, dtype=torch.float64), TokenContext())
    torch.testing.assert_close(routing.weights, torch.ones(13, 1, dtype=torch.float64))
    (grad,) = torch.autograd.grad(routing.weights.square().sum(), [router.weight])
    assert grad.abs().max() < 1e-12


def test_dropped_gate_is_never_selected():
    torch.manual_seed(0)
    router = TopKRouter(7, 4, top_k=3, expert_dropout=0.6)
    routing = router(torch.randn(200, 7), TRAINING)
    empty = routing.experts == 4
    assert empty.any() and (~empty).any()
    assert routing.weights[empty].eq(0).all()
    selected = routing.probs.gather(1, routing.experts.clamp_max(3))
    assert selected[~empty].gt(0).all()
    assert torch.equal(routing.request_matrix().sum(-1), (~empty).sum(-1).float())


@pytest.mark.parametrize("normalise", [False, True])
def test_a_token_whose_gates_are_all_dropped_has_no_weight(normalise):
    torch.manual_seed(0)
    router = TopKRouter(7, 2, top_k=2, expert_dropout=0.9, norm_topk_prob=normalise)
    routing = router(torch.randn(50, 7), TRAINING)
    lost = (routing.experts == 2).all(-1)
    assert lost.any()
    assert routing.weights[lost].eq(0).all() and routing.gate_matrix().isfinite().all()
    (grad,) = torch.autograd.grad(routing.gate_matrix().square().sum(), [router.weight])
    assert grad.isfinite().all()


class Wider(TopK):
    """Says itself how many columns it gives."""

    def __init__(self, *, top_k):
        super().__init__(top_k=top_k)
        self.num_slots = None


@pytest.mark.parametrize("selector", [TopK, BiasBalanced, NullTopK, Capacity])
def test_a_number_of_experts_that_is_changed_between_steps_is_the_number_of_slots(selector):
    select = selector(top_k=1)
    made = LinearRouter(7, 5, select=select)
    for top_k in (1, 3, 2):
        select.top_k = top_k
        assert made.num_slots == made(torch.randn(4, 7), TokenContext()).experts.shape[1] == top_k
    assert LinearRouter(7, 5, select=Wider(top_k=2)).num_slots == 5
