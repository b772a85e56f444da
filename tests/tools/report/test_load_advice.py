"""What the load of experts means comes with its number, and names a field that the configuration has."""

from __future__ import annotations

import dataclasses

import pytest

from moe_peft.tools.report.evidence import Evidence
from moe_peft.tools.report.load_advice import advise_on_load
from tests.tools.report.test_advice import CONFIG, place


@pytest.mark.parametrize(
    ("kind", "places", "number", "field"),
    [
        (
            "collapsed",
            [place([90, 5, 3, 2])],
            "expert 0 of layers.0.up has 90% of the gate mass",
            "router_aux_loss_coef",
        ),
        ("unused", [place([50, 50, 40, 0])], "less than 1% of an even share", "num_experts"),
        ("too_many", [place([60, 60, 1, 1])], "2.2 of 4 experts in effect", "num_experts"),
        ("undecided", [place([5, 5, 5, 5], entropy=0.995)], "99.5% of the largest entropy", "router_lr"),
        ("no_router", [place([5, 5, 5, 5], spread=0.0)], "every token gets the same weights", None),
        ("backbone", [place([5, 5, 5, 5], backbone=True)], "4.0 of 4 experts in effect", None),
    ],
)
def test_each_finding_has_its_number_and_the_field_to_change(kind, places, number, field):
    found = {own.kind: own for own in advise_on_load(Evidence(places, config=CONFIG))}
    assert kind in found and number in found[kind].evidence
    assert found[kind].field == field
    if field not in (None, "router_lr"):
        assert field in {own.name for own in dataclasses.fields(CONFIG)}
        assert f"{field}={getattr(CONFIG, field)}" in found[kind].action


def test_a_load_that_is_even_needs_no_word():
    assert advise_on_load(Evidence([place([5, 4, 6, 5])], config=CONFIG)) == []
