"""`python -m moe_peft` is the command; tests/cli/test_main.py runs it in a process of its own."""

from __future__ import annotations

import runpy

import pytest


def test_the_module_ends_with_the_commands_exit_code(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moe_peft", "no-such-verb"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("moe_peft", run_name="__main__")
    assert end.value.code == 2 and "is no verb" in capsys.readouterr().err
