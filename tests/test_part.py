"""What a part says of itself: nothing is promised beyond one token and one row, and an option knows what fits."""

from __future__ import annotations

import pytest

from moe_peft.part import ModulePart, Option, Part


def test_a_part_that_says_nothing_can_neither_be_merged_nor_give_anything():
    assert not ModulePart.mergeable and not ModulePart.keeps_float32 and ModulePart.frozen == ()
    assert not (Part.gives or Part.needs or Part.context_needs or Part.fields or Part.options)


@pytest.mark.parametrize(("value", "fits"), [(0.5, True), (2, False), ("a", False), (None, False), ([], False)])
def test_a_value_that_cannot_be_compared_does_not_fit(value, fits):
    assert Option("p", 0.1, "a number from 0 to 1", lambda v: 0 <= v <= 1).accepts(value) is fits
