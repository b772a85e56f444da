"""Columns are as wide as their widest cell."""

from __future__ import annotations

from moe_peft.cli.tables import table


def test_the_first_column_is_left_and_the_others_are_right():
    assert table([("a", "n"), ("long", "1"), ("b", "1000")]) == "a        n\nlong     1\nb     1000"
    assert table([("a", "")], indent=2) == "  a"
