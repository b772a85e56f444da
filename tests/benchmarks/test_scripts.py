"""The benchmarks run at a small size, check what they time, and write what the page's tables are made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SMALL = {
    "train_step": "--hidden 32 --layers 1 --tokens 9 --rounds 2 --dtypes float32 --telemetry",
    "decode": "--hidden 32 --layers 1 --experts 4 --top-k 2 --prompt 5 --tokens 1 --rounds 2",
    "expert_lora": "--hidden 32 --layers 1 --experts 4 --tokens 8 --rounds 2 --dtypes bfloat16 --no-memory",
    "moe_block": "--hidden 32 --experts 4 --top-k 2 --tokens 8 --rounds 2",
    "routed_sum": "--tokens 3 --experts 8 --width 16 --out 16 --rounds 2",
    "catalogue": "--hidden 32 --tokens 8 --rounds 1 --only tree entmax null_top_k ffn_lora task_table expert_clusters",
    "promises": "--seeds 0 --steps 2",
    "tools": "--seeds 0 --steps 2",
    "growth": "--width 64 --tokens 4 --rounds 2",
}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore::moe_peft.MoePeftWarning")
def test_a_benchmark_writes_rows_that_a_table_shows(name, scripts, monkeypatch, tmp_path):
    import table
    import torch

    if name == "growth":
        import growth

        monkeypatch.setattr(growth, "EXPERTS", (1, 4))
        monkeypatch.setattr(growth, "TOKENS", (4, 8))
        monkeypatch.setattr(growth, "LAYERS", (1, 2))
    threads, module = torch.get_num_threads(), __import__(name)
    plot = ["--plot", str(tmp_path / f"{name}.svg")] if name in ("growth", "tools") else []
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name].split(), *plot, "--output", str(tmp_path / f"{name}.json")])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["rows"] and record["versions"]["peft"] and "cores" in record["machine"]
    for row in record["rows"]:
        assert row.get("median_s", 1) > 0
        if "over" in row and row["contestant"] == row["over"]:
            assert row["ratio"] == 1.0
    text = table.table(name, tmp_path)
    assert text.count("\n| ") > len(record["rows"])
    assert not plot or (tmp_path / f"{name}.svg").read_text().count("<svg") == 1


def test_what_is_aimed_at_stands_beside_its_figures(scripts, tmp_path):
    import targets

    rows = [
        {"contestant": "a, long", "tokens": 16, "ratio": 1.06, "spread": [0.9, 1.2]},
        {"contestant": "b", "tokens": 16, "ratio": 1.04, "spread": [1.0, 1.1]},
        {"contestant": "b", "tokens": 99, "ratio": 9.0, "spread": [9.0, 9.0]},
    ]
    (tmp_path / "steps.json").write_text(json.dumps({"rows": rows}))

    def cells(limit, **options):
        return targets.Target("step", "LoRA", "steps", limit, ("a, long", "b"), {"tokens": 16}, **options).cells(
            tmp_path
        )

    measured = "a 1.06 (0.90 to 1.20); b 1.04 (1.00 to 1.10)"
    assert cells(1.05) == ["step", "LoRA", "at most 1.05", measured, "not by a", "steps"]
    assert cells(1.06)[4] == "yes" and cells(1.0)[4] == "no" and cells(1.05, at_least=True)[4] == "not by b"
    assert cells(1.05, form="{:.1f}x")[3].startswith("a 1.1x") and cells(1.1, form="{:.1f}x")[4] == "yes"
    with pytest.raises(LookupError, match="0 rows of a, long"):
        targets.Target("step", "LoRA", "steps", 1.0, ("a, long",), {"tokens": 99}).cells(tmp_path)


@pytest.mark.slow
def test_contestants_are_compiled_to_one_graph(scripts, monkeypatch, tmp_path):
    import torch
    import train_step

    flags = "--compiled --only MoLORA --hidden 32 --layers 1 --tokens 9 --rounds 2 --dtypes float32"
    monkeypatch.setattr(sys, "argv", ["train_step", *flags.split(), "--output", str(tmp_path / "compiled.json")])
    threads = torch.get_num_threads()
    try:
        train_step.main()
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "compiled.json").read_text())
    assert [row["contestant"] for row in record["rows"]] == ["peft LoRA", "frozen model", "MoLORA"]


@pytest.mark.parametrize(
    ("flags", "said"), [("--only nobody", "no contestant is called nobody"), ("--compiled --slow", "not compiled")]
)
def test_contestants_that_are_not_there_are_refused(flags, said, scripts, monkeypatch, capsys):
    import train_step

    monkeypatch.setattr(sys, "argv", ["train_step", *flags.split()])
    with pytest.raises(SystemExit):
        train_step.main()
    assert said in capsys.readouterr().err


def test_every_registered_part_is_timed_with_parts_that_it_fits(scripts):
    import catalogue

    from moe_peft import RoutedConfig

    timed = {(axis, name) for axis, name, _ in catalogue.choices()}
    assert timed == {
        (axis, name) for axis, own in {**catalogue.AXES, "loss": catalogue.LOSSES}.items() for name in own
    }
    for _, _, fields in catalogue.choices():
        RoutedConfig(router_aux_loss_coef=0.0, **fields)


def test_a_ratio_is_that_of_the_same_round(scripts):
    from timing import rows

    found = rows({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0], "frozen": [0.5] * 3}, {"b": "a"}, "frozen", size=3)
    by_name = {row["contestant"]: row for row in found}
    assert by_name["b"]["ratio"] == 2.0 and by_name["b"]["spread"] == [2.0, 2.0] and by_name["b"]["size"] == 3
    assert by_name["b"]["increment"] == (4.0 - 0.5) / (2.0 - 0.5)
    assert "ratio" not in by_name["a"]


def test_a_process_that_takes_too_long_is_given_up(scripts, monkeypatch):
    import argparse
    import subprocess

    import expert_lora

    def late(command, **limits):
        assert "--output" not in command and limits["timeout"] == 1.0
        raise subprocess.TimeoutExpired(command, limits["timeout"])

    monkeypatch.setattr(subprocess, "run", late)
    sizes = {"hidden": 8, "layers": 1, "top_k": 1, "tokens": 2, "r": 1, "threads": 1, "memory_seconds": 1.0}
    assert expert_lora.peak_memory(expert_lora.OWN, argparse.Namespace(**sizes), 4, "float32") is None
