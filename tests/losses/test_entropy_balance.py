"""Entropy balance: least where the experts' mean probabilities are even, whatever single tokens prefer."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft.losses.entropy_balance import EntropyBalance
from moe_peft.types import Routing, TokenContext
from tests.compare import assert_same, random_routing


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
def test_equals_the_formula_over_valid_tokens(num_tokens):
    valid = torch.arange(num_tokens) % 4 != 1
    routing = random_routing(num_tokens, 5, context=TokenContext(valid=valid))
    q = [routing.probs[valid, e].mean() for e in range(5)]
    assert_same(EntropyBalance()(routing), sum(v * v.log() for v in q), [routing.logits], [routing.logits])


def test_sure_tokens_that_share_the_experts_cost_least_and_one_expert_for_all_costs_most():
    shared, alone = torch.eye(4).double(), torch.eye(4)[[1, 1, 1, 1]].double()
    values = [EntropyBalance()(Routing(p, None, p, p)).item() for p in (shared, alone)]
    assert values == pytest.approx([-math.log(4), 0.0])
