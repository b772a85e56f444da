"""The sparsity bound: zero exactly where a token uses at most k experts, and moving the sparsity alone."""

from __future__ import annotations

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.losses.sparsity_bound import SparsityBound
from moe_peft.routers import LinearRouter
from moe_peft.routers.sparsegen import Sparsegen
from moe_peft.types import TokenContext
from tests.compare import assert_same

D, E, T = 7, 5, 40


def decided(**context):
    torch.manual_seed(0)
    made = LinearRouter(D, E, select=Sparsegen()).double()
    torch.nn.init.normal_(made.weight, std=0.7)
    x = torch.randn(T, D, dtype=torch.float64)
    return made, x, made(x, TokenContext(**context))


@pytest.mark.parametrize("active", [1, 2, 4])
def test_equals_the_formula_over_valid_tokens(active):
    valid = torch.arange(T) % 4 != 1
    made, x, routing = decided(valid=valid)
    own = []
    for t in range(T):
        if valid[t]:
            z = sorted((x[t] @ made.weight[:E].T).tolist(), reverse=True)
            lower = 1 - (sum(z[:active]) - active * z[active])
            own.append((lower - (1 - 0.01 + torch.nn.functional.logsigmoid(x[t] @ made.weight[E]))).clamp(min=0))
    assert_same(SparsityBound(active=active)(routing), sum(own) / len(own), [made.weight], [made.weight])


@pytest.mark.parametrize("active", [1, 2, 3])
def test_a_token_costs_something_exactly_where_it_uses_more_than_k(active):
    made, x, routing = decided()
    costs = [SparsityBound(active=active)(made(x[t : t + 1], TokenContext())).item() for t in range(T)]
    more = routing.request_matrix().sum(-1) > active
    assert [cost > 0 for cost in costs] == more.tolist() and 0 < more.sum() < T
    routing = made(x, TokenContext())
    SparsityBound(active=active)(routing).backward()
    assert not made.weight.grad[:E].any() and made.weight.grad[E].any()


def test_all_experts_are_no_bound():
    with pytest.raises(ValueError, match="active=4 must be less than num_experts=4"):
        losses = {"sparsity_bound": {"weight": 0.1, "active": 4}}
        RoutedConfig(router="sparsegen", num_experts=4, losses=losses)
