"""Clusters of experts: the variance within each, none between them, and a last cluster that is smaller."""

from __future__ import annotations

import pytest
import torch

from moe_peft.losses.expert_clusters import ExpertClusters
from moe_peft.types import Routing, TokenContext
from tests.compare import assert_same, random_routing


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_equals_the_formula_over_valid_tokens(size):
    valid = torch.arange(13) % 4 != 1
    routing = random_routing(13, 5, context=TokenContext(valid=valid))
    mean = [routing.probs[valid, e].mean() for e in range(5)]
    expected = routing.probs.sum() * 0
    for start in range(0, 5, size):
        own = torch.stack(mean[start : start + size])
        expected = expected + 5 * (own - own.mean()).square().sum()
    assert_same(ExpertClusters(size)(routing), expected, [routing.logits], [routing.logits], 1e-10)


def test_clusters_that_differ_cost_nothing_and_uneven_ones_do():
    for row, free in (([0.4, 0.4, 0.1, 0.1], True), ([0.4, 0.1, 0.4, 0.1], False)):
        p = torch.tensor([row]).double()
        assert (ExpertClusters()(Routing(p, None, p, p)).item() < 1e-15) == free
