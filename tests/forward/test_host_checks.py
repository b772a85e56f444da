"""Compiled code checks a batch's numbers when it runs, and raises what the check does, or stops by an assertion."""

from __future__ import annotations

import pytest
import torch

from moe_peft.forward.group_columns import take_groups
from moe_peft.forward.host_checks import assert_known


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def taken(values: torch.Tensor) -> torch.Tensor:
    groups = take_groups({"kind": values}, {"kind": frozenset({1, 4})}, given={}, needed=True, checked=set())
    return groups.values * 2


def test_a_compiled_graph_refuses_groups_with_the_words_of_the_check():
    run = torch.compile(taken, backend="aot_eager", fullgraph=True)
    assert run(torch.tensor([1, 4, 1])).tolist() == [2, 8, 2]
    with pytest.raises(ValueError, match=r"'kind' holds the sample groups \[0, 5\].*known are \[1, 4\]"):
        run(torch.tensor([5, 0, 4]))


def test_a_compiled_graph_stops_at_numbers_that_are_not_known():
    def asserted(values):
        assert_known(values, [1, 4], "no such group")
        return values + 1

    run = torch.compile(asserted, backend="aot_eager", fullgraph=True)
    assert run(torch.tensor([4, 1])).tolist() == [5, 2]
    with pytest.raises(RuntimeError, match="no such group"):
        run(torch.tensor([4, 2]))
