"""Errors as one line."""

from __future__ import annotations

import pytest

from moe_peft.cli.errors import LONGEST, one_line, wants_traceback


def test_a_message_is_one_line_of_bounded_length():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 10 * LONGEST))) == LONGEST + 3


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), ("", False)])
def test_the_environment_asks_for_a_traceback(value, wanted, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_TRACEBACK", value)
    assert wants_traceback() == wanted
