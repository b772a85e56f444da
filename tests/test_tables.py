"""Columns are as wide as their widest cell, in every table of the package."""

from __future__ import annotations

import re

import pytest

from moe_peft.tables import aligned, table
from tests.docs.pages import ROOT


def test_the_first_column_is_left_and_the_others_are_right():
    assert table([("a", "n"), ("long", "1"), ("b", "1000")]) == "a        n\nlong     1\nb     1000"
    assert table([("a", "")], indent=2) == "  a"


def test_each_column_has_a_side_and_further_ones_that_of_the_last():
    rows = [("a", "b", "c"), ("aa", "bb", "cc")]
    assert aligned(rows, ">") == [[" a", " b", " c"], ["aa", "bb", "cc"]]
    assert aligned(rows, "><") == [[" a", "b ", "c "], ["aa", "bb", "cc"]]
    assert aligned([("a",)], "<>") == [["a"]]
    with pytest.raises(ValueError):
        aligned([("a", "b"), ("a",)])


def test_no_other_file_fills_cells_up_to_widths_of_its_own():
    by_hand = re.compile(r":[<>]\{|\.[lr]just\(")
    files = [path for folder in ("moe_peft", "train") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100 and not [path for path in files if by_hand.search(path.read_text())]
