"""`moe-peft selections` compares selections and writes one of several, as the functions do."""

from __future__ import annotations

import pytest

from moe_peft import ExpertSelection
from moe_peft.cli import main
from moe_peft.selection import join_selections, overlap_table

SELECTED = {"law": {"0": [1, 2], "1": [3]}, "tax": {"0": [2], "1": [0, 3]}, "art": {"0": [0], "1": [3]}}


@pytest.fixture
def made(tmp_path):
    """Selections of tasks, as the script writes them: a file in a folder of the task's name."""
    found = {name: ExpertSelection(own, num_experts={"0": 4, "1": 4}) for name, own in SELECTED.items()}
    for name, own in found.items():
        (tmp_path / name).mkdir()
        own.save(tmp_path / name / "expert_config.json")
    return found


@pytest.mark.parametrize("how", ["any", "all", "most"])
def test_tasks_are_compared_and_joined(how, made, tmp_path, capsys):
    words = [str(tmp_path / "law"), f"money={tmp_path}/tax/expert_config.json", str(tmp_path / "art")]
    assert main(["selections", *words, "--join", how, "--output", str(tmp_path / "all.json")]) == 0
    named = {"law": made["law"], "money": made["tax"], "art": made["art"]}
    assert overlap_table(named) in capsys.readouterr().out
    assert ExpertSelection.load(tmp_path / "all.json").experts == join_selections(named.values(), how).experts


def test_what_cannot_be_compared_is_one_line_and_writes_nothing(made, tmp_path, capsys):
    other = ExpertSelection({"0": [1]}, num_experts={"0": 8})
    other.save(tmp_path / "other.json")
    law, out = str(tmp_path / "law"), str(tmp_path / "out.json")
    for words, message in (
        ([law, "--join", "any"], "go together"),
        ([law, "--output", out], "go together"),
        ([law, law], "Two selections"),
        ([str(tmp_path / "nowhere")], "is no file"),
        ([law, str(tmp_path / "other.json"), "--join", "any", "--output", out], "different backbones"),
    ):
        assert main(["selections", *words]) == 1
        printed = capsys.readouterr().err
        assert message in printed and "Traceback" not in printed
    assert not (tmp_path / "out.json").exists()
