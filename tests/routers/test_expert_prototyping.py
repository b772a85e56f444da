"""One expert out of each group: the softmax within the group, groups that are all zero, and sizes that divide."""

from __future__ import annotations

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.routers.expert_prototyping import ExpertPrototyping
from moe_peft.routers.relu import Relu
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import E, T, linear


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_a_softmax_in_each_group_of_which_the_largest_counts(groups):
    made, x = linear(ExpertPrototyping(num_prototypes=groups))
    z, size = x @ made.weight.T, E // groups
    rows = []
    for t in range(T):
        row = torch.zeros(E).double()
        for start in range(0, E, size):
            own = z[t, start : start + size].softmax(-1)
            row = row.index_add(0, own.argmax()[None] + start, own.max()[None])
        rows.append(row)
    routing = made(x, TokenContext())
    assert_same(routing.gate_matrix(), torch.stack(rows), [x, made.weight], [x, made.weight], 1e-10)
    assert routing.experts.shape == (T, groups) and made.num_slots == groups


def test_a_group_whose_gates_are_all_zero_gives_no_expert():
    made, x = linear(ExpertPrototyping(num_prototypes=2), Relu())
    probs = (x @ made.weight.T).relu()
    empty = (probs.unflatten(-1, (2, 2)) == 0).all(-1)
    routing = made(x, TokenContext())
    assert empty.any() and torch.equal(routing.experts == E, empty)
    assert torch.isfinite(routing.weights).all() and not routing.weights[empty].any()


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_prototypes=3 must divide num_experts=4"):
        RoutedConfig(router="expert_prototyping", num_experts=4, router_args={"num_prototypes": 3})
