"""Token entropy: the mean over valid tokens, zero for sure decisions, log E for flat ones."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft.losses.token_entropy import TokenEntropy
from moe_peft.types import Routing, TokenContext
from tests.compare import assert_same, random_routing


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
def test_equals_the_formula_over_valid_tokens(num_tokens):
    valid = torch.arange(num_tokens) % 4 != 1
    routing = random_routing(num_tokens, 5, context=TokenContext(valid=valid))
    own = [-sum(p * p.log() for p in row) for row, counts in zip(routing.probs, valid, strict=True) if counts]
    assert_same(TokenEntropy()(routing), sum(own) / len(own), [routing.logits], [routing.logits])


def test_sure_decisions_cost_nothing_and_flat_ones_log_e():
    sure, flat = torch.eye(4).double(), torch.full((4, 4), 0.25).double()
    values = [TokenEntropy()(Routing(p, None, p, p)).item() for p in (sure, flat)]
    assert values == pytest.approx([0.0, math.log(4)], abs=1e-12)
