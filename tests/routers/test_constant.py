"""The constant router gives every expert the same weight for every token, and has nothing to learn."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import ConstantRouter
from moe_peft.types import TokenContext


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_every_weight_is_one_times_the_factor(num_tokens):
    x = torch.randn(num_tokens, 7)
    routing = ConstantRouter(7, 3)(x, TokenContext())
    assert routing.experts is None and torch.equal(routing.gate_matrix(), torch.ones(num_tokens, 3))
    scaled = ConstantRouter(7, 3, routed_scaling_factor=0.5)(x, TokenContext())
    assert torch.equal(scaled.gate_matrix(), torch.full((num_tokens, 3), 0.5))
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(num_tokens))


def test_nothing_is_learnt_and_nothing_depends_on_the_input():
    router = ConstantRouter(7, 3)
    assert not list(router.parameters()) and router.mergeable
    assert router.causal and router.batch_invariant and router.decode_stateless


@pytest.mark.parametrize(
    ("given", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_weights_are_float32_or_wider(given, kept):
    routing = ConstantRouter(7, 3)(torch.randn(13, 7, dtype=given), TokenContext())
    assert routing.weights.dtype == routing.probs.dtype == routing.logits.dtype == kept
