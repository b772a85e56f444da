"""Methods are compared on the same data, steps and sizes, or not at all."""

from __future__ import annotations

import json
import sys

import compare
import measured_run
import pytest

from moe_peft.cli import main
from tests.train.tiny_run import make_base, make_data, words, write_run

SHORT = {"moe_num_experts": 2, "moe_r": 3, "moe_router_aux_loss_coef": 0.05, "max_steps": 4, "eval_steps": None}


def here(script, given, folder):
    return measured_run.measure(script, given)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_base(folder / "base")
    make_data(folder / "data", [{"text": words(i, 6)} for i in range(10)])
    return folder


def write(inputs, folder, name="run", **values):
    named = {"model_name_or_path": str(inputs / "base"), "dataset_name": str(inputs / "data")}
    run = write_run(folder, **{**SHORT, **named, "output_dir": None, "logging_steps": None, **values})
    return str(run.rename(folder / f"{name}.yaml"))


@pytest.mark.parametrize("seeds", [[0], pytest.param([0, 1], marks=pytest.mark.slow)])
def test_methods_are_measured_at_one_size_from_one_start(seeds, inputs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = write(inputs, tmp_path)
    given = ["--config", run, "--moe_config", "routed", "--moe_config", "lora", "--seeds", *map(str, seeds)]
    given += ["--moe_target_modules", "q_proj", "v_proj", "--output_dir", str(tmp_path / "out")]
    found = compare.main(given, here)
    printed = capsys.readouterr().out
    routed, lora = found["table"]
    assert (routed["method"], lora["method"]) == ("routed", "lora")
    assert abs(lora["trained parameters"] / routed["trained parameters"] - 1) < 0.05
    assert f"{lora['trained parameters']:,} trained parameters with moe_r" in printed
    for runs in found["runs"].values():
        assert [own["seed"] for own in runs] == seeds and all(own["steps"] == 4 for own in runs)
        losses = [[value for _, value in own["curves"]["loss"]] for own in runs]
        assert len(set(map(str, losses))) == len(seeds) and all(len(own["curves"]["eval_loss"]) >= 3 for own in runs)
    starts = [own["curves"]["eval_loss"][0] for runs in found["runs"].values() for own in runs]
    assert starts == [starts[0]] * 2 * len(seeds)  # every method starts at the base model
    assert json.loads((tmp_path / "out/compare.json").read_text())["runs"].keys() == {"routed", "lora"}
    assert (tmp_path / "out/compare.md").read_text() in printed
    assert (tmp_path / "out/compare.png").stat().st_size > 10_000
    assert (tmp_path / "out/lora/seed-0/adapter_config.json").is_file()


@pytest.mark.slow
def test_the_verb_runs_every_training_in_a_process_of_its_own(inputs, tmp_path, capsys):
    files = [
        write(inputs, tmp_path / name, name, **own) for name, own in (("first", {}), ("second", {"moe_top_k": 1}))
    ]
    given = ["compare", "--config", files[0], "--config", files[1], "--seeds", "3"]
    assert main([*given, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/compare.json").read_text())
    assert found["runs"]["first"][0]["memory"] > 0 and "| second" in capsys.readouterr().out
    assert main([*given, "--max_steps", "4", "--learning_rate", "-1", "--output_dir", str(tmp_path / "bad")]) == 1
    said = capsys.readouterr().err
    assert said.endswith("--learning_rate -1 must be above 0.\n") and "Traceback" not in said


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (
            {"max_steps": 5},
            [],
            r"first and second cannot be compared: max_steps is 4 in one and 5 in the other\.",
        ),
        ({"dataset_name": "x"}, [], "dataset_name is .* in one"),
        ({"moe_variant": "R"}, [], r"second: .*moe_variant has no meaning for moe_method routed"),
        ({}, ["--seeds", "1", "1"], r"--seeds \[1, 1\]: every seed once"),
        ({}, ["--moe_config", "nothing"], "--moe_config nothing: there is no such file"),
        ({}, ["--max_step", "3"], "--max_step is no flag of"),
        ({}, ["--dataset_name", "nowhere.jsonl"], r"--dataset_name nowhere\.jsonl: there is no such file"),
        (
            {},
            ["--dataset_test_split", "dev"],
            r"--dataset_test_split dev: the data has .*--test_split_size",
        ),
        ({}, ["--learning_rate", "-1"], "--learning_rate -1 must be above 0"),
        ({}, ["--model_name_or_path", "./nowhere"], "there is no such folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(change, given, message, inputs, tmp_path):
    files = []
    for name, values in (("first", {}), ("second", change)):
        files += ["--config", write(inputs, tmp_path / name, name, **values)]
    with pytest.raises(ValueError, match=message):
        compare.main([*files, *given, "--output_dir", str(tmp_path / "out")], lambda *_: pytest.fail("trained"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "Give --config with a run's file or name"),
        (["--config", "a/run.yaml", "--config", "b/run.yaml"], "Two of the files are called 'run'"),
        (["--config", "a.yaml", "--output_dir", __file__], "is a file. Name a folder"),
    ],
)
def test_words_that_say_no_comparison_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        compare.main(given)


def test_a_run_that_fails_is_named_with_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=r"exit code 1: no output \(see .*log\.txt\)"):
        compare.measured("sft", [], tmp_path)
