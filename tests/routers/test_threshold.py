"""A learned threshold: experts count by what is above it; one always does under a softmax, maybe none elsewhere."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts import LowRankExperts
from moe_peft.routers import LinearRouter
from moe_peft.routers.sigmoid import Sigmoid
from moe_peft.routers.threshold import Threshold
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import D, E, T, linear, rows


@pytest.mark.parametrize("tau_max", [None, 0.2, 1.0])
@pytest.mark.parametrize("gate", [None, Sigmoid()])
def test_equals_the_formula(tau_max, gate):
    made, x = linear(Threshold(tau_max=tau_max), gate)
    expected = []
    for t in range(T):
        z = torch.stack([(made.weight[j] * x[t]).sum() for j in range(E + 1)])
        p, tau = z[:E].softmax(-1) if gate is None else z[:E].sigmoid(), (tau_max or 1 / E) * z[E].sigmoid()
        above = [(p[e] - tau).clamp(min=0) for e in range(E)]
        expected.append([value / sum(above) if sum(above) > 0 else value for value in above])
    routing = made(x, TokenContext())
    assert_same(routing.gate_matrix(), rows(expected), [x, made.weight], [x, made.weight])
    assert routing.logits.shape == routing.probs.shape == (T, E)


def test_a_softmax_always_keeps_an_expert():
    made, x = linear(Threshold(), num_tokens=200)
    made.weight.data[E] *= 50
    assert made(x, TokenContext()).request_matrix().sum(-1).min() >= 1


def test_a_token_below_the_threshold_is_left_as_it_is():
    made, x = linear(Threshold(tau_max=1.0), Sigmoid())
    made.weight.data[:E] = -5 * x[0].detach()
    made.weight.data[E] = 5 * x[0].detach()
    bank = LowRankExperts(D, 5, num_experts=E, r=2, scaling=1.0, init_weights=False).double()
    base = torch.randn(T, 5).double()
    out = bank(x, base, made(x, TokenContext()))
    assert torch.equal(out[0], base[0])
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(made.weight.grad).all()


def test_the_threshold_starts_at_half_of_its_largest_for_every_token():
    made = LinearRouter(D, E, select=Threshold())
    tau = made(torch.randn(5, D), TokenContext()).extras["threshold"]
    assert torch.equal(tau, torch.full((5,), 0.5 / E)) and (made.weight[:E] != 0).all()
