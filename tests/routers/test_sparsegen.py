"""Sparse simplex weights solve their definition, and sum to one whatever is left out."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_peft.routers.sparsegen import Sparsegen, sparsemax
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import TRAINING, E, T, linear


def best_of_all_supports(z, lam):
    """argmin over the simplex of |w - z|^2 - lam |w|^2, by trying every support."""
    best, value = None, float("inf")
    for support in itertools.chain(*(itertools.combinations(range(len(z)), n) for n in range(1, len(z) + 1))):
        own = list(support)
        tau = (z[own].sum() - (1 - lam)) / len(own)
        w = torch.zeros_like(z).index_put((torch.tensor(own),), (z[own] - tau) / (1 - lam))
        cost = ((w - z).square().sum() - lam * w.square().sum()).item()
        if w.min() >= 0 and cost < value:
            best, value = w, cost
    return best


@pytest.mark.parametrize("eps", [0.01, 0.5])
def test_equals_the_definition(eps):
    made, x = linear(Sparsegen(eps=eps))
    expected = []
    for t in range(T):
        z = torch.stack([(made.weight[j] * x[t]).sum() for j in range(E + 1)])
        expected.append(best_of_all_supports(z[:E], 1 - eps + torch.nn.functional.logsigmoid(z[E])))
    routing = made(x, TokenContext())
    assert_same(routing.gate_matrix(), torch.stack(expected), [x, made.weight], [x, made.weight], 1e-10)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(T).double())
    assert len(set(routing.request_matrix().sum(-1).tolist())) > 1


def test_a_common_shift_changes_nothing_and_large_scores_do_not_overflow():
    z = torch.randn(9, 5, dtype=torch.float64)
    torch.testing.assert_close(sparsemax(z + 3), sparsemax(z))
    assert torch.equal(sparsemax(torch.tensor([[1e30, -1e30, 1e30]])), torch.tensor([[0.5, 0.0, 0.5]]))


def test_dropped_experts_get_no_weight_and_the_others_all_of_it():
    made, x = linear(Sparsegen(expert_dropout=0.5), expert_dropout=0.5, num_tokens=200)
    routing = made(x, TRAINING)
    kept = routing.probs != 0
    assert not routing.weights[~kept].any()
    torch.testing.assert_close(routing.weights.sum(-1), kept.any(-1).double())
    assert not torch.equal(routing.weights, made(x, TokenContext()).weights)
