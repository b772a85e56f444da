"""Experts drawn in training and averaged in evaluation: one a sample, evenly, and a merge into the mean."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig
from moe_peft.routers.random import RandomRouter
from moe_peft.types import TokenContext
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

D, E, T = 7, 4, 12
OWNER = torch.arange(T) // 4


def context(**fields) -> TokenContext:
    return TokenContext(training=True, sequences=OWNER, num_sequences=3, num_rows=3, **fields)


def test_every_sequence_has_one_expert_in_training_and_all_in_evaluation():
    router, x = RandomRouter(D, E), torch.randn(T, D)
    weights = router(x, context()).weights
    assert (weights.sum(-1) == 1).all() and ((weights == 0) | (weights == 1)).all()
    assert all(torch.equal(weights[s == OWNER], weights[s == OWNER][:1].expand(4, -1)) for s in range(3))
    assert torch.equal(router(x, TokenContext()).weights, torch.full((T, E), 1 / E))
    router.perturbs_training = False
    assert torch.equal(router(x, context()).weights, torch.full((T, E), 1 / E))


def test_a_batch_may_share_its_draw():
    weights = RandomRouter(D, E, draw_for="batch")(torch.randn(T, D), context()).weights
    assert torch.equal(weights, weights[:1].expand(T, -1)) and weights[0].sum() == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_experts_are_drawn_evenly_and_again_from_the_same_seed(seed):
    router, known = RandomRouter(D, E), TokenContext(training=True, sequences=torch.arange(2000), num_sequences=2000)
    draws = []
    for _ in range(2):
        torch.manual_seed(seed)
        draws.append(router(torch.zeros(2000, D), known).weights)
    assert torch.equal(*draws)
    torch.testing.assert_close(draws[0].mean(0), torch.full((E,), 1 / E), atol=0.04, rtol=0)


def test_the_adapter_merges_into_the_mean_of_what_experts_add():
    config = RoutedConfig(router="random", num_experts=4, r=2)
    model, batch = get_peft_model(tiny_llama(), config).double().eval(), padded_batch([5, 3])
    randomize(model)
    with torch.no_grad():
        before = model(**batch).logits
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, before, rtol=1e-9, atol=1e-9)
