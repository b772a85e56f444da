"""Scores of a small network: the formula, a border that no matrix draws, and further columns that start at zero."""

from __future__ import annotations

import torch

from moe_peft.routers import TopK
from moe_peft.routers.threshold import Threshold
from moe_peft.routers.two_layer import TwoLayer
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import D, E, T


def made(select=None, **settings):
    torch.manual_seed(0)
    router = TwoLayer(D, E, select=select or TopK(top_k=2), width=5, **settings).double()
    return router, torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def test_equals_the_formula():
    router, x = made()
    low = [router.hidden @ x[t] for t in range(T)]
    z = torch.stack([router.weight @ (own * own.sigmoid()) for own in low])
    leaves = [x, *router.parameters()]
    assert_same(router(x, TokenContext()).logits, z, leaves, leaves, 1e-10)


def test_scores_of_an_input_and_its_negative_are_no_negatives_of_each_other():
    router, x = made()
    both = [router.scores(own, TokenContext()) for own in (x, -x)]
    assert (both[0] + both[1]).abs().max() > 1e-2


def test_a_threshold_starts_at_zero_and_the_start_can_be_set():
    router, _ = made(Threshold())
    assert router.weight.shape == (E + 1, 5) and not router.weight[E].any() and router.weight[:E].all()
    router, _ = made(init_std=1e-6)
    assert router.weight.abs().max() < 1e-4 < router.hidden.abs().max()
