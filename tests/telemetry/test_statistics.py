"""Sums of parts add up to those of the whole, shares sum to one, and padding counts for nothing."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.types import Routing, TokenContext
from tests.compare import random_routing


def part_of(routing: Routing, rows: slice) -> Routing:
    """The decision about some of the tokens."""

    def cut(tensor):
        return None if tensor is None else tensor[rows]

    return replace(
        routing,
        weights=routing.weights[rows],
        experts=cut(routing.experts),
        logits=routing.logits[rows],
        probs=routing.probs[rows],
        dropped=cut(routing.dropped),
        context=TokenContext(valid=cut(routing.valid)),
    )


def decision(top_k: int | None, masked: bool, capacity: bool) -> Routing:
    valid = torch.arange(12) % 3 != 0 if masked else None
    routing = random_routing(12, 5, top_k, unused=3 if top_k else None, context=TokenContext(valid=valid))
    return replace(routing, dropped=torch.arange(24).view(12, 2) % 5 == 0) if capacity else routing


CASES = [(None, False, False), (None, True, False), (2, False, False), (2, True, False), (2, True, True)]


@pytest.mark.parametrize("case", CASES)
def test_the_sums_of_parts_add_up_to_those_of_the_whole(case):
    routing = decision(*case)
    whole = RoutingStatistics.of(routing)
    parts = [RoutingStatistics.of(part_of(routing, rows)) for rows in (slice(0, 5), slice(5, 6), slice(6, 12))]
    for own in fields(RoutingStatistics):
        values = [getattr(part, own.name) for part in parts]
        if values[0] is None:
            assert getattr(whole, own.name) is None
        else:
            torch.testing.assert_close(sum(values), getattr(whole, own.name))


@pytest.mark.parametrize("case", CASES)
def test_shares_sum_to_one_and_every_number_is_within_its_bounds(case):
    routing = decision(*case)
    own = RoutingStatistics.of(routing)
    for share in (own.load, own.importance):
        torch.testing.assert_close(share.sum(), torch.ones_like(share.sum()))
    assert 0 <= own.load_entropy <= 1 and 1 <= own.max_over_mean_load <= 5 and 0 <= own.drop_rate < 1
    assert 1 / 5 <= own.confidence <= 1 and int(own.dead_experts) == (1 if case[0] else 0)


def test_padding_counts_for_nothing():
    routing = decision(2, True, True)
    kept = part_of(routing, routing.valid.nonzero()[:, 0])
    own, expected = RoutingStatistics.of(routing), RoutingStatistics.of(replace(kept, context=TokenContext()))
    for name in (own.name for own in fields(RoutingStatistics)):
        torch.testing.assert_close(getattr(own, name), getattr(expected, name))


def test_a_batch_of_padding_alone_gives_numbers_and_no_graph():
    valid = torch.zeros(4, dtype=torch.bool)
    own = RoutingStatistics.of(random_routing(4, 3, 2, context=TokenContext(valid=valid)))
    values = (own.load, own.importance, own.load_entropy, own.max_over_mean_load, own.drop_rate, own.confidence)
    assert all(bool(torch.isfinite(value).all()) and not value.requires_grad for value in values)
