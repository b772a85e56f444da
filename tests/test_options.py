"""Options and promises of parts: what is given is checked, by name and value, against what the parts declare."""

from __future__ import annotations

import pytest

from moe_peft.options import all_options, check_options, check_sizes, option_values
from moe_peft.part import Option, Part


class Tempered(Part):
    options = (Option("tau", 1.0, "a positive number", lambda v: v > 0, "Temperature."),)


class Counted(Part):
    options = (Option("count", 4, "a whole number from 1", lambda v: isinstance(v, int) and v >= 1),)

    @classmethod
    def misfit(cls, options, sizes):
        return None if options["count"] <= sizes["num_experts"] else f"count={options['count']} must be less"


def test_what_is_given_goes_to_the_part_that_declares_it_and_defaults_fill_the_rest():
    given = {"tau": 0.5}
    check_options((Tempered, Counted), given, "router_args")
    assert option_values(Tempered, given) == {"tau": 0.5} and option_values(Counted, given) == {"count": 4}
    assert option_values(Tempered, None) == {"tau": 1.0}
    assert set(all_options((Tempered, Counted))) == {"tau", "count"}


@pytest.mark.parametrize(
    ("parts", "given", "message"),
    [
        (
            (Tempered, Counted),
            {"tua": 1},
            "router_args: 'tua' is no option of the chosen parts; they have 'tau'",
        ),
        ((), {"tau": 1}, "they have none, so leave it None"),
        ((Tempered,), {"tau": -1}, "router_args: tau=-1 must be a positive number"),
        ((Tempered,), {"tau": "hot"}, "tau='hot' must be a positive number"),
        ((Counted,), {"count": None}, "count=None must be a whole number from 1"),
    ],
)
def test_unknown_names_and_misfits_are_refused_with_what_to_write(parts, given, message):
    with pytest.raises(ValueError, match=message):
        check_options(parts, given, "router_args")


def test_values_in_messages_are_cut():
    with pytest.raises(ValueError) as caught:
        check_options((Tempered,), {"tau": "x" * 10_000}, "router_args")
    assert len(str(caught.value)) < 300


def test_parts_are_asked_whether_their_options_fit_the_sizes():
    check_sizes((Tempered, Counted), None, {"num_experts": 4}, "router_args")
    check_sizes((Tempered, Counted), {"count": 9}, {"num_experts": 9}, "router_args")
    with pytest.raises(ValueError, match="router_args: count=4 must be less"):
        check_sizes((Tempered, Counted), {"tau": 1}, {"num_experts": 3}, "router_args")


class Hotter(Part):
    options = (Option("tau", 2.0, "a number of at least 0.5", lambda v: v >= 0.5),)


@pytest.mark.parametrize("parts", [(Tempered, Hotter), (Hotter, Tempered)])
def test_an_option_that_several_parts_take_must_fit_each_of_them(parts):
    check_options(parts, {"tau": 0.5}, "router_args")
    with pytest.raises(ValueError, match=r"router_args: tau=0\.1 must be a number of at least 0\.5 for Hotter"):
        check_options(parts, {"tau": 0.1}, "router_args")
    with pytest.raises(ValueError, match="tau=nan must be a"):
        check_options(parts, {"tau": float("nan")}, "router_args")
