"""The command: its help, its verbs, and errors of users in one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moe_peft import MoloraConfig
from moe_peft.cli import main
from moe_peft.cli.verbs import VERBS
from moe_peft.tools import compress_adapter
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, digest, trained, trained_lora


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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What the verbs that write read: a base model, adapters, a LoRA, a compressed adapter, and texts."""
    folder = tmp_path_factory.mktemp("inputs")
    base = checkpoint(tiny_llama(), folder / "base", shard="5GB")
    own = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    trained(base, folder / "one", MoloraConfig(num_experts=1, **own))
    trained(base, folder / "two", MoloraConfig(num_experts=2, r=4, **own))
    trained_lora(folder / "lora", target_modules=["q_proj"])
    compress_adapter(folder / "two", folder / "small")
    (folder / "texts").write_text("w3 w4 w5\n")
    return folder


WRITING = {
    "export-lora": "export {0}/one --to lora",
    "export-merged": "export {0}/one --to merged",
    "compose": "compose {0}/lora --base {0}/base",
    "upcycle": "upcycle {0}/lora --num_experts 2 --base {0}/base",
    "add-expert": "add-expert {0}/two",
    "prune": "prune {0}/two --keep 1 --texts {0}/texts",
    "distil": "distil {0}/two --texts {0}/texts --rank 1 --steps 0",
    "compress": "compress {0}/two",
    "decompress": "decompress {0}/small",
}


@pytest.mark.parametrize("verb", WRITING)
def test_an_interruption_of_a_verb_that_writes_leaves_neither_half_a_folder_nor_a_changed_input(
    verb, inputs, tmp_path, monkeypatch, capsys
):
    words = [*WRITING[verb].format(inputs).split(), "--output", str(tmp_path / "out")]
    before, move = digest(inputs), os.replace

    def interrupted(source, target):
        if str(target) == str(tmp_path / "out"):
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("moe_peft.files.os.replace", interrupted)
        assert main(words) == 130
    assert not list(tmp_path.iterdir()) and digest(inputs) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("stays")
    assert main(words) == 1 and "holds files" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
