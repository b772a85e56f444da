"""The command: its help, its verbs, and errors of users in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_peft.cli import main
from moe_peft.cli.verbs import VERBS


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_help_names_every_verb(words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {verb} " in printed for verb in VERBS)
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize("verb", [verb for verb, (_, script, _) in VERBS.items() if script is None])
def test_every_verb_that_launches_nothing_has_help(verb, capsys):
    try:
        assert main([verb, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    assert f"moe-peft {verb}" in capsys.readouterr().out


def test_a_wrong_verb_is_answered_with_the_nearest(capsys):
    assert main(["inspct", "folder"]) == 2
    assert capsys.readouterr().err == "moe-peft: 'inspct' is no verb. Did you mean inspect?\n"


def test_an_error_of_a_user_is_one_line_and_its_traceback_can_be_asked_for(capsys, monkeypatch):
    assert main(["configs", "nowhere"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("moe-peft configs: ") and printed.err.count("\n") == 1
    monkeypatch.setenv("MOE_PEFT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nowhere"):
        main(["configs", "nowhere"])


def test_the_module_runs_and_its_help_imports_no_trainer():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['moe_peft', '--help']\n"
        "try:\n    runpy.run_module('moe_peft', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'trl', 'datasets', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "select-experts" in result.stdout
