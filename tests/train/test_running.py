"""How a script ends: one line for what a user can mend, a traceback for what happened in training, 130 for Ctrl-C."""

from __future__ import annotations

import os
import signal
import warnings
from types import SimpleNamespace

import pytest
from running import IN_TRAINING, run

from moe_peft.cli.errors import NOISE


def ending(error, monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def main(*arguments):
        raise error

    run(lambda: SimpleNamespace(prog="sft.py", parse_args_and_config=tuple), main)


@pytest.mark.parametrize("error", [ValueError("a\nb"), FileNotFoundError("a b"), ImportError("a b")])
def test_a_mistake_is_one_line_and_exit_code_1(error, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        ending(error, monkeypatch)
    assert end.value.code == 1 and capsys.readouterr().err == "sft.py: a b\n"


def test_other_processes_say_nothing_of_a_mistake_that_all_make(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        ending(ValueError("a"), monkeypatch, RANK="1")
    assert capsys.readouterr().err == ""


def test_an_error_of_training_keeps_its_traceback_and_one_can_be_asked_for(monkeypatch):
    error = ValueError("a")
    setattr(error, IN_TRAINING, True)
    with pytest.raises(ValueError, match="a"):
        ending(error, monkeypatch)
    with pytest.raises(ValueError, match="b"):
        ending(ValueError("b"), monkeypatch, MOE_PEFT_TRACEBACK="1")


def test_names_that_other_packages_call_are_no_noise_and_other_warnings_stay(recwarn):
    def main(*arguments):
        warnings.warn(f"{NOISE} and will be removed in v6.", FutureWarning, stacklevel=1)
        warnings.warn("another", FutureWarning, stacklevel=1)

    run(lambda: SimpleNamespace(prog="sft.py", parse_args_and_config=tuple), main)
    assert [str(entry.message) for entry in recwarn] == ["another"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_ends_with_130_and_is_said_once_whatever_a_launcher_passes_on(rank, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            ending(KeyboardInterrupt(), monkeypatch, RANK=rank)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert ("nothing was saved" in capsys.readouterr().err) == (rank == "0")
