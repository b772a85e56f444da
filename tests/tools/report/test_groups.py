"""Groups are compared place by place, and chance is told by halves of one group."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft.tools.report.groups import chance, pair_means, shares_by_group
from moe_peft.tools.report.measure import PlaceRouting, measure_routing
from moe_peft.tools.report.measures import divergence

from .conftest import batches_of, routed_model


def place(**mass) -> PlaceRouting:
    own = PlaceRouting("layers.0", "default", 2)
    for label, values in mass.items():
        group, half = label.split("_")
        values = torch.tensor(values, dtype=torch.float64)
        own.sums[group, int(half)] = [values, values, values.sum(), values.sum()]
    return own


def test_a_pair_is_compared_at_the_places_that_both_have_reached():
    both, one = place(a_0=[1, 0], b_0=[0, 1]), place(a_0=[1, 0])
    found = pair_means([both, one], ["a", "b", "c"])
    assert found[0][1] == found[1][0] == 1 and found[0][0] == 0
    assert all(math.isnan(found[2][column]) for column in range(3))


def test_chance_is_half_of_what_halves_of_one_group_are_apart():
    own = place(a_0=[3, 1], a_1=[1, 3], b_0=[1, 1])
    assert chance([own], ["a", "b"]) == pytest.approx(divergence(torch.tensor([[0.75, 0.25], [0.25, 0.75]])) / 2)
    assert math.isnan(chance([own], ["b"]))


def test_texts_of_other_tokens_are_further_apart_than_chance():
    model = routed_model()
    ids = {"low": range(3, 5), "high": range(40, 42)}
    groups = {}
    for name, own in ids.items():
        rows = torch.tensor([[list(own)[(row + i) % 2] for i in range(8)] for row in range(8)])
        groups[name] = [{"input_ids": rows[:4]}, {"input_ids": rows[4:]}]
    places = measure_routing(model, groups)
    apart = pair_means(places, list(groups))[0][1]
    assert apart > 5 * chance(places, list(groups)) and apart > 0.1


def test_shares_of_groups_without_tokens_are_left_out():
    places = measure_routing(routed_model(), batches_of("law"))
    assert shares_by_group(places[0], ["law", "code"]).shape == (1, 4)
