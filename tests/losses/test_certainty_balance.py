"""Certain tokens and balanced experts: the formula, and nothing to pay beyond both targets."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.losses.certainty_balance import CertaintyBalance
from moe_peft.types import Routing, TokenContext
from tests.compare import assert_same, random_routing


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize(("balance", "certainty"), [(1.0, 0.0), (1.0, 0.5), (0.9, 0.9)])
def test_equals_the_formula_over_valid_tokens(num_tokens, balance, certainty):
    valid = torch.arange(num_tokens) % 4 != 1
    routing = random_routing(num_tokens, 5, context=TokenContext(valid=valid))
    probs, largest = routing.probs[valid], math.log(5)
    used = -(probs.mean(0) * probs.mean(0).log()).sum() / largest
    certain = -(probs * probs.log()).sum(-1).mean() / largest
    expected = (balance - used).clamp_min(0) + (certain - certainty).clamp_min(0)
    loss = CertaintyBalance(balance=balance, certainty=certainty)
    assert_same(loss(routing), expected, [routing.logits], [routing.logits])


def test_sure_tokens_that_share_the_experts_cost_nothing_and_all_else_costs():
    shared, alone, unsure = torch.eye(4).double(), torch.eye(4)[[1, 1]].double(), torch.full((3, 4), 0.25).double()
    values = [CertaintyBalance()(Routing(p, None, p, p)).item() for p in (shared, alone, unsure)]
    assert values == pytest.approx([0.0, 0.98, 0.5], abs=1e-12)


def test_targets_that_cross_are_refused():
    with pytest.raises(ValueError, match=r"certainty=0.9 must be at most balance=0.8"):
        RoutedConfig(losses={"certainty_balance": {"weight": 0.1, "balance": 0.8, "certainty": 0.9}})
