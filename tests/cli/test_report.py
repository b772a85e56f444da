"""`moe-peft report` writes a page for the texts of files, and says in a line what is wrong with them."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import moe_peft
from moe_peft.cli import main
from tests.train.tiny_run import make_base, words


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    base = AutoModelForCausalLM.from_pretrained(make_base(folder / "base"))
    config = moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4, init_weights=False)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    for name, seed in (("law", 0), ("code", 50)):
        rows = [{"text": words(seed + i, 5), "task": "ab"[i % 2]} for i in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_files_are_groups_and_the_page_lies_beside_its_numbers(adapter, capsys):
    files = [word for name in ("law", "code") for word in ("--data", str(adapter / f"{name}.jsonl"))]
    assert main(["report", "--adapter", str(adapter / "adapter"), *files, "--no-plots", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    folder = adapter / "adapter/routing_report"
    assert f"report      {folder / 'index.html'}" in printed
    found = json.loads((folder / "numbers.json").read_text())
    assert found["groups"] == {"law": {"tokens": 30}, "code": {"tokens": 30}} and found["title"] == "adapter"
    assert all(own["title"] in printed for own in found["advice"])
    assert "Groups" in (folder / "index.html").read_text()


def test_a_column_makes_groups_and_rows_are_limited(adapter, tmp_path):
    given = ["report", "--adapter", str(adapter / "adapter"), "--data", str(adapter / "law.jsonl"), "--no-plots"]
    assert main([*given, "--group-column", "task", "--rows", "2", "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/numbers.json").read_text())
    assert found["groups"] == {"a": {"tokens": 10}, "b": {"tokens": 10}}


@pytest.mark.parametrize(
    ("words_given", "message"),
    [
        (["--data", "none.jsonl"], "--data none.jsonl: there is no such file"),
        (["--data", __file__, "--rows", "0"], "--rows 0 must be at least 1"),
        (["--data", __file__, "--output", __file__], "is a file. Name a folder"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(adapter, words_given, message, capsys):
    assert main(["report", "--adapter", str(adapter / "adapter"), *words_given]) == 1
    assert message in capsys.readouterr().err
