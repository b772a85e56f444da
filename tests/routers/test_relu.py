"""The ReLU gate leaves out what scores below zero, and a token that nothing scores for gets nothing."""

from __future__ import annotations

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.experts import LowRankExperts
from moe_peft.routers.positive import Positive
from moe_peft.routers.relu import Relu
from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import D, E, T, linear, rows


def test_equals_the_formula_and_what_scores_below_zero_is_no_request():
    made, x = linear(Positive(), Relu())
    routing = made(x, TokenContext())
    z = [[(made.weight[e] * x[t]).sum() for e in range(E)] for t in range(T)]
    expected = rows([[value if value > 0 else torch.zeros(()).double() for value in row] for row in z])
    assert_same(routing.gate_matrix(), expected, [x, made.weight], [x, made.weight])
    assert torch.equal(routing.request_matrix(), (expected > 0).double())
    load = (expected > 0).sum(0) / (expected > 0).sum()
    torch.testing.assert_close(RoutingStatistics.of(routing).load, load.double())


def test_a_token_without_a_positive_score_is_left_as_it_is():
    made, x = linear(Positive(), Relu())
    made.weight.data[:] = -x[0].detach() + 0 * made.weight
    bank = LowRankExperts(D, 5, num_experts=E, r=2, scaling=1.0, init_weights=False).double()
    base = torch.randn(T, 5).double()
    out = bank(x, base, made(x, TokenContext()))
    assert torch.equal(out[0], base[0]) and not torch.equal(out, base)
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scorer", ["tree", "hybrid"])
def test_scores_that_are_never_above_zero_are_refused_before_a_model_is_there(scorer):
    with pytest.raises(ValueError, match=f"gate='relu' must be .*{scorer}.* no expert would ever be used"):
        RoutedConfig(router="positive", scorer=scorer, gate="relu")
    RoutedConfig(router="positive", scorer="linear", gate="relu")
