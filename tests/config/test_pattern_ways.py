"""The count of ways is what `re` may try: ways lead where matches end, each with its number."""

from __future__ import annotations

import itertools
import re

import pytest

from moe_peft.config.pattern_ways import _Counter, count_ways, sre_parse


def brute_force(pattern: str, name: str) -> set[int]:
    """Ends of all matches of a pattern at the start of a name."""
    return {end for end in range(len(name) + 1) if re.fullmatch(pattern, name[:end])}


@pytest.mark.parametrize(
    "pattern",
    ["a*b?", "(ab|a)(b|bb)*", "[ab]{2,3}", "a+?b*", "(a|b|ab)*", "(a*)*b", "(a?b?){2,}", r"\w.[^a]", "(?i)A(B|b)"],
)
def test_ways_lead_where_matches_end(pattern):
    for letters in itertools.product("ab", repeat=4):
        name = "".join(letters)
        counts = _Counter(name).sequence(sre_parse.parse(pattern), [1.0] + [0.0] * len(name))
        assert {end for end, count in enumerate(counts) if count} == brute_force(pattern, name), name


def test_ways_of_parts_one_after_the_other_are_counted_with_their_number():
    assert count_ways(sre_parse.parse("a*"), "aaaa") == 4 + 5  # one for each letter, and five places to stop
    assert count_ways(sre_parse.parse("(a|b)"), "a") == 2  # the branch, and the group
