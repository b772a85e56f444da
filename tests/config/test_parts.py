"""Parts of one layer merge where each of them does the same to every token; what is no part promises nothing."""

from __future__ import annotations

import pytest
from torch import nn

from moe_peft.config.parts import RoutedParts, parts_merge
from moe_peft.extend import ConstantRouter, Dense, LinearRouter, LowRankExperts

BANK = LowRankExperts(4, 4, num_experts=1, r=2, scaling=1.0)


class Derived(LowRankExperts):
    """May compute something else: the promise is not inherited."""


@pytest.mark.parametrize(
    ("experts", "router", "merges"),
    [
        (BANK, None, True),
        (BANK, ConstantRouter(4, 1), True),
        (BANK, LinearRouter(4, 1, select=Dense()), True),
        (BANK, LinearRouter(4, 2, select=Dense()), False),
        (Derived(4, 4, num_experts=1, r=2, scaling=1.0), None, False),
        (nn.Linear(4, 4), None, False),
    ],
)
def test_parts_merge_where_all_of_them_say_so(experts, router, merges):
    assert parts_merge(experts, router) is merges is RoutedParts(experts=experts, router=router).mergeable
