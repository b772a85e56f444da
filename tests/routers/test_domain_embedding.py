"""Rows made of descriptions: the formula, descriptions that never train, and a row for an expert that comes later."""

from __future__ import annotations

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.routers import TopK
from moe_peft.routers.domain_embedding import DomainEmbedding
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import D, E, T, rows


def made(**settings):
    torch.manual_seed(0)
    router = DomainEmbedding(D, E, select=TopK(top_k=2), width=5, hidden=6, **settings).double()
    return router, torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def test_equals_the_formula():
    router, x = made()
    found, logits = router(x, TokenContext()), []
    for t in range(T):
        logits.append([])
        for d in router.domains:
            g = router.gate_weight @ d
            row = router.weight @ (g * g.sigmoid() * (router.value_weight @ d))
            logits[-1].append((row * x[t]).sum())
    leaves = [x, router.gate_weight, router.value_weight, router.weight]
    assert_same(found.logits, rows(logits), leaves, leaves, 1e-10)
    assert not router.domains.requires_grad and router.learns


def test_an_expert_with_the_description_of_another_is_scored_as_it():
    router, x = made()
    router.domains.data[2] = router.domains.data[0]
    z = router(x, TokenContext()).logits
    torch.testing.assert_close(z[:, 2], z[:, 0], rtol=1e-12, atol=1e-12)
    assert (z[:, 1] - z[:, 0]).abs().max() > 1e-3


def test_16_bit_inputs_are_scored_in_float32_and_the_start_can_be_set():
    router, x = made(init_std=1e-6)
    found = router.bfloat16()(x.bfloat16(), TokenContext()).logits
    assert found.dtype == torch.float32 and 0 < found.detach().abs().max() < 1e-2


def test_further_columns_of_selectors_are_refused():
    with pytest.raises(ValueError, match="needs no extra_scores"):
        RoutedConfig(scorer="domain_embedding", router="null_top_k")
