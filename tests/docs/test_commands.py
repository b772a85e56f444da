"""Every command of the pages is one that its verb takes: flags of scripts are parsed, others found in the help."""

from __future__ import annotations

import functools
import importlib
import re
import shlex

import pytest
from accelerate.commands.launch import launch_command_parser

from moe_peft.cli import launch, main
from moe_peft.cli.verbs import VERBS
from tests.docs.pages import OTHERS, PAGES, name_of, programs

DOCUMENTS = [page for page in [*PAGES, *OTHERS] if page.name != "CHANGELOG.md"]
HERE = ["--use_cpu", "true", "--bf16", "false"]


def commands(page) -> list[list[str]]:
    """The words of each `moe-peft VERB ...` in the blocks of a page."""
    blocks = programs(page, "bash") + programs(page, "sh")
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["moe-peft"]]


ALL = {f"{name_of(page)}: {' '.join(words)}"[:150]: words for page in DOCUMENTS for words in commands(page)}
TRAINING = {name: words for name, words in ALL.items() if len(words) > 1 and VERBS[words[0]][1] is not None}


@functools.cache
def parser_of(script: str):
    return importlib.import_module(script).make_parser()


@pytest.mark.parametrize("name", [name for name, words in TRAINING.items() if "--help" not in words])
def test_the_script_of_a_verb_takes_every_flag(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verb, *words = TRAINING[name]
    _, own = launch.split(words, launch_command_parser())
    parsed = parser_of(VERBS[verb][1]).parse_args_and_config([*own, *HERE])
    assert parsed[2].model_name_or_path and parsed[1].output_dir


def test_other_verbs_have_every_flag_in_their_help(capsys):
    others = [words for name, words in ALL.items() if name not in TRAINING and len(words) > 1 and words[0] != "run"]
    assert len(others) > 20
    shown = {}
    for verb, *words in others:
        if verb not in shown:
            with pytest.raises(SystemExit):
                main([verb, "--help"])
            shown[verb] = capsys.readouterr().out
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            # A comparison passes on what it does not know.
            assert verb == "compare" or re.search(rf"{flag}\b", shown[verb]), (verb, flag)
