"""Importance is the squared coefficient of variation of the experts' gate mass."""

from __future__ import annotations

import pytest
import torch

from moe_peft.losses import importance
from moe_peft.types import Routing, TokenContext
from tests import reference
from tests.compare import assert_same, gates_of, random_routing


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, None), (5, None), (5, 1), (5, 3)])
def test_equals_the_formula(num_tokens, num_experts, top_k):
    valid = torch.arange(num_tokens) % 4 != 1
    routing = random_routing(num_tokens, num_experts, top_k, context=TokenContext(valid=valid))
    expected = reference.importance(gates_of(routing), num_experts, valid.tolist())
    assert_same(importance(routing), expected, [routing.logits], [routing.logits])


def test_even_mass_gives_zero():
    even = torch.full((8, 4), 0.25, dtype=torch.float64)
    assert importance(Routing(even, None, even, even)).item() == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("num_experts", [1, 2, 6])
def test_all_mass_on_one_expert_gives_e_minus_one(num_experts):
    gates = torch.zeros(8, num_experts, dtype=torch.float64)
    gates[:, 0] = 1.0
    value = importance(Routing(gates, None, gates, gates))
    assert value.item() == pytest.approx(num_experts - 1, rel=1e-8, abs=1e-12)


def test_scale_of_the_gates_does_not_matter():
    gates = torch.rand(8, 4, dtype=torch.float64)
    one, other = (importance(Routing(s * gates, None, gates, gates)).item() for s in (1.0, 7.0))
    assert one == pytest.approx(other, rel=1e-9) and one > 0
