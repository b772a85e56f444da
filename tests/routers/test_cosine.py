"""Cosine scores: the formula, no effect of lengths, and a temperature that is learned and bounded."""

from __future__ import annotations

import math

import torch

from moe_peft.routers import TopK
from moe_peft.routers.cosine import GAIN, LOWEST, Cosine
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import D, E, T, rows


def made(**settings):
    torch.manual_seed(0)
    router = Cosine(D, E, select=TopK(top_k=2), width=5, **settings).double()
    return router, torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def test_equals_the_formula():
    router, x = made(tau=0.3)
    z = []
    for t in range(T):
        low = router.projection @ x[t]
        z.append([(low * v).sum() / (low.norm() * v.norm()) / router.log_tau.exp()[0] for v in router.weight])
    leaves = [x, *router.parameters()]
    assert_same(router(x, TokenContext()).logits, rows(z), leaves, leaves, 1e-10)
    assert math.isclose(router.log_tau.exp().item(), 0.3, rel_tol=1e-6)


def test_lengths_of_inputs_and_vectors_change_nothing_and_nothing_is_rewritten():
    router, x = made()
    before, weight = router(x, TokenContext()).logits, router.weight.detach().clone()
    router.weight.data *= 3
    torch.testing.assert_close(router(7 * x, TokenContext()).logits, before)
    assert torch.equal(router.weight, 3 * weight)


def test_vectors_start_orthogonal_and_the_temperature_has_a_floor():
    router, x = made()
    torch.testing.assert_close(router.weight @ router.weight.T, GAIN**2 * torch.eye(E).double(), rtol=1e-5, atol=1e-6)
    router.log_tau.data.fill_(-100.0)
    assert router(x, TokenContext()).logits.abs().max() <= 1 / LOWEST * (1 + 1e-9)
