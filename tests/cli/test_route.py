"""`moe-peft route` shows the experts of each token, of one place a layer or of those that are named."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import moe_peft
from moe_peft.cli import main
from tests.train.tiny_run import make_base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("route")
    base = AutoModelForCausalLM.from_pretrained(make_base(folder / "base"))
    get_peft_model(base, moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4)).save_pretrained(
        folder / "adapter"
    )
    return folder / "adapter"


def test_each_token_has_its_experts_at_one_place_of_each_layer(adapter, capsys, tmp_path):
    assert main(["route", "--adapter", str(adapter), "w7 w8", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "[0] model.layers.0.mlp." in printed and "[1] model.layers.1.mlp." in printed and "[2]" not in printed
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("w8")]
    written = json.loads((tmp_path / "out.json").read_text())
    weights = next(rows[1] for place, rows in written["weights"].items() if place.startswith("model.layers.0.mlp."))
    best = max(range(4), key=weights.__getitem__)
    assert written["tokens"] == ["w7", "w8"] and row[1] == f"{best}:{weights[best]:.2f}"
    assert len(row) == 1 + 2 * 2


def test_places_are_chosen_by_a_part_of_their_names(adapter, capsys):
    assert main(["route", "--adapter", str(adapter), "w7", "--place", "layers.1.mlp", "--top", "1"]) == 0
    printed = capsys.readouterr().out
    assert "[2] model.layers.1.mlp" in printed and "layers.0" not in printed


WRONG = {
    "a place": (["--place", "nowhere"], "--place nowhere: no place is called so"),
    "no experts": (["--top", "0"], "--top 0 must be at least 1"),
    "a folder": (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: there is no folder /nowhere"),
    "a base": (["--base", "nobody/nothing"], "--base nobody/nothing is no folder here, and cannot be fetched"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_one_line(case, adapter, capsys):
    words, message = WRONG[case]
    assert main(["route", "--adapter", str(adapter), "w7", *words]) == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
