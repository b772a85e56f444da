"""Experts of one size: the formula, outputs as large as the gain, the identity at the start, and shared experts."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts.normalized import EPS, NormalizedExperts
from moe_peft.types import Routing
from tests.compare import assert_same, random_routing

from .bank import OUT, D, E, R, T, made


def alone(bank, e, x):
    """What an expert makes of a token, at one size."""
    own = bank.B[e].T @ (bank.A[e] @ x)
    return bank.gain[e] * own / (own.square().mean() + EPS).sqrt()


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("top_k", [None, 2])
def test_adds_the_weighed_sum_of_outputs_of_one_size(top_k, shared):
    bank, x, base = made(NormalizedExperts, shared=shared)
    routing = random_routing(T, E, top_k)
    gates = routing.gate_matrix()
    rows = []
    for t in range(T):
        row = base[t] + 1.7 * sum(gates[t, e] * alone(bank, e, x[t]) for e in range(E))
        rows.append(row + 1.7 * sum(alone(bank, E + s, x[t]) for s in range(shared)))
    leaves = [x, routing.logits, *bank.parameters()]
    assert_same(bank(x, base, routing), torch.stack(rows), leaves, leaves, 1e-9)
    assert_same(bank(x, base.clone(), routing, in_place=True), torch.stack(rows), leaves, leaves, 1e-9)


def test_the_size_of_an_output_is_that_of_the_gain_and_not_of_the_experts_matrices():
    bank, x, _ = made(NormalizedExperts, scaling=1.0)
    bank.gain.data.fill_(0.5)
    ones = torch.zeros(T, E).double()
    ones[:, 1] = 1
    routing, nothing = Routing(ones, None, ones, ones), torch.zeros(T, OUT).double()
    before = bank(x, nothing, routing)
    torch.testing.assert_close(before.square().mean(-1).sqrt(), torch.full((T,), 0.5).double(), rtol=1e-4, atol=1e-4)
    bank.B.data[1] *= 1000
    torch.testing.assert_close(bank(x, nothing, routing), before, rtol=1e-4, atol=1e-4)


def test_starts_as_the_identity_with_gradients_in_the_gains_alone_and_does_not_merge():
    torch.manual_seed(0)
    bank = NormalizedExperts(D, OUT, num_experts=E, r=R, scaling=1.0)
    base = torch.randn(T, OUT)
    out = bank(torch.randn(T, D), base, random_routing(T, E))
    assert torch.equal(out.float(), base) and not bank.mergeable
    out.sum().backward()
    assert bank.gain.grad.any() and not bank.A.grad.any() and not bank.B.grad.any()
    with pytest.raises(ValueError, match="does not know which direction"):
        bank.directions()
