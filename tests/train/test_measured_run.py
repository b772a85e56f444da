"""A run of a comparison writes what it measured, in the units that it names."""

from __future__ import annotations

import json

import measured_run

from tests.train.tiny_run import make_base, make_data, words, write_run


def test_a_run_is_measured_without_its_evaluations(tmp_path):
    base = make_base(tmp_path / "base")
    data = make_data(tmp_path / "data", [{"text": words(i, 5)} for i in range(8)])
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, save_strategy="no")
    flags = ["--config", str(run), "--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "true"]
    measured_run.main("sft", str(tmp_path / "found.json"), flags)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["steps"] == 3 and found["parameters"] > 0 and found["seconds"] > 0
    assert [step for step, _ in found["curves"]["loss"]] == [1, 2, 3]
    assert [step for step, _ in found["curves"]["eval_loss"]] == [0, 1, 2, 3]
    assert found["curves"]["reward"] == [] and found["memory"] >= 0
