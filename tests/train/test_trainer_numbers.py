"""Numbers and templates with which no run can be made are one line, before a model is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sft import make_parser
from trainer_numbers import LEAST, check_numbers, check_template_path
from training import prepare

WORDS = ["--use_cpu", "--output_dir", "out", "--model_name_or_path", "none"]
WRONG = {
    "--learning_rate": ("-1", "0", "nan", "inf"),
    "--max_length": ("0",),
    "--per_device_train_batch_size": ("0",),
    "--num_train_epochs": ("0",),
    "--max_steps": ("0", "-2"),
    "--save_steps": ("0",),
    "--weight_decay": ("-0.1",),
}


def parsed(*words):
    return make_parser().parse_args_and_config([*WORDS, *words])


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in WRONG.items() for value in values])
def test_a_number_out_of_its_range_is_named_with_it(flag, value, monkeypatch):
    monkeypatch.setattr("training.check_model_name", lambda name: None)
    _, training_args, model_args, _, moe_args = parsed(f"{flag}={value}")
    with pytest.raises(ValueError, match=rf"{flag} {value} must be (above|at least)"):
        prepare(model_args, training_args, moe_args, "sft")


def test_the_trainers_own_numbers_pass_and_are_all_known():
    _, training_args, *_ = parsed()
    check_numbers(training_args)
    # One of them belongs to trainers that generate.
    assert {name for name in LEAST if not hasattr(training_args, name)} == {"max_completion_length"}
    check_numbers(SimpleNamespace(max_steps=5, num_train_epochs=0, eval_steps=None, logging_steps=0.1))


def test_a_template_that_is_not_there_is_named(tmp_path):
    for path in ("nowhere.jinja", "./nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"--chat_template_path .*: there is no such file"):
            check_template_path(path)
    for path in (None, str(tmp_path), "Qwen/Qwen3-0.6B"):
        check_template_path(path)
