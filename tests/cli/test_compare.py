"""`moe-peft compare` is the script of the comparison."""

from __future__ import annotations

import sys

import pytest

from moe_peft.cli import main


def test_mistakes_are_one_line_and_the_path_is_left_as_it_was(capsys):
    before = list(sys.path)
    assert main(["compare"]) == 1
    assert capsys.readouterr().err.startswith("moe-peft compare: Give --config with a run's file or name")
    assert sys.path == before


def test_the_help_lists_what_is_the_comparisons_own(capsys):
    with pytest.raises(SystemExit) as end:
        main(["compare", "--help"])
    assert end.value.code == 0 and "--seeds" in capsys.readouterr().out
