"""The z-loss is the mean squared log-sum-exp of the scores."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft.losses import z_loss
from moe_peft.types import Routing, TokenContext
from tests import reference
from tests.compare import as_lists, assert_same, random_routing


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize("num_experts", [1, 5])
def test_equals_the_formula(num_tokens, num_experts):
    valid = torch.arange(num_tokens) % 4 != 1
    routing = random_routing(num_tokens, num_experts, context=TokenContext(valid=valid))
    expected = reference.z_loss(as_lists(routing.logits), valid.tolist())
    assert_same(z_loss(routing), expected, [routing.logits], [routing.logits])


def test_zero_scores_give_the_squared_log_of_e():
    zeros = torch.zeros(13, 6, dtype=torch.float64)
    assert z_loss(Routing(zeros, None, zeros, zeros)).item() == pytest.approx(math.log(6) ** 2, rel=1e-12)


def test_log_probabilities_as_scores_give_zero():
    scores = torch.randn(13, 6, dtype=torch.float64).log_softmax(-1)
    assert z_loss(Routing(scores.exp(), None, scores, scores.exp())).item() == pytest.approx(0.0, abs=1e-24)


def test_large_scores_do_not_overflow():
    scores = torch.full((3, 4), 1e4)
    assert z_loss(Routing(scores, None, scores, scores)).item() == pytest.approx((1e4 + math.log(4)) ** 2, rel=1e-5)
