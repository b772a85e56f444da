"""Every verb has a module with a `run`, and every script that trains a verb."""

from __future__ import annotations

from importlib import import_module

from moe_peft.cli.shipped import shipped
from moe_peft.cli.verbs import VERBS


def test_every_verb_has_its_module_and_every_script_a_verb():
    assert all(callable(import_module(f"moe_peft.cli.{module}").run) for module, _, _ in VERBS.values())
    scripts = {path.stem for path in shipped("train").glob("*.py") if "def make_parser" in path.read_text()}
    assert scripts == {script for _, script, _ in VERBS.values() if script is not None}
