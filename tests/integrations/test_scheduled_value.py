"""Schedules of parts' numbers: their values by step, resumed and saved, and what they may not be."""

from __future__ import annotations

import pytest
from peft import PeftModel
from transformers import TrainerCallback

from moe_peft import routed_layers
from moe_peft.integrations import ScheduledValue, attach
from tests.integrations.test_callback import adapted
from tests.integrations.test_parameter_groups import trainer_of
from tests.tiny import tiny_llama


class Seen(TrainerCallback):
    def __init__(self, read):
        self.read, self.values = read, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.values.append({self.read(layer) for layer in routed_layers(model)})


def run(tmp_path, name, points, read, *, steps=4, resume=None, **fields):
    trainer = attach(trainer_of(tmp_path, adapted(**fields), max_steps=steps, save_strategy="steps", save_steps=2))
    seen = Seen(read)
    trainer.add_callback(ScheduledValue(name, points))
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen.values


def k_of(layer):
    select = layer.router["default"].select
    assert select.num_slots == select.top_k
    return select.top_k


def test_k_grows_by_step_and_the_last_one_is_saved(tmp_path):
    trainer, seen = run(tmp_path, "top_k", {0: 1, 3: 4}, k_of, scorer="fixed_random", coef=0.0)
    assert seen == [{1}, {2}, {3}, {4}]
    trainer.model.save_pretrained(tmp_path / "last")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "last")
    assert again.peft_config["default"].top_k == 4 and {k_of(layer) for layer in routed_layers(again)} == {4}


def test_a_resumed_run_goes_on_by_the_step(tmp_path):
    run(tmp_path, "top_k", {0: 1, 3: 4}, k_of, steps=2)
    _, seen = run(tmp_path, "top_k", {0: 1, 3: 4}, k_of, resume=str(tmp_path / "checkpoint-2"))
    assert seen == [{3}, {4}]


def test_temperatures_and_dropouts_change_too(tmp_path):
    _, seen = run(tmp_path, "tau", {0: 1.0, 4: 0.2}, lambda layer: layer.router["default"].gate.tau, gate="gumbel")
    assert [value for (value,) in seen] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    trainer, seen = run(
        tmp_path / "b", "lora_dropout", {0: 0.5, 2: 0.0}, lambda own: own.experts["default"].lora_dropout.p
    )
    assert [value for (value,) in seen] == pytest.approx([0.5, 0.25, 0.0, 0.0])
    assert trainer.model.peft_config["default"].lora_dropout == 0.0


def test_a_run_that_fails_leaves_the_numbers_it_began_with(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = attach(trainer_of(tmp_path))
    trainer.add_callback(ScheduledValue("top_k", {0: 1}))
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert {k_of(layer) for layer in routed_layers(trainer.model)} == {2}


@pytest.mark.parametrize(
    ("name", "points", "message"),
    [
        ("tau", {0: 1.0}, r"the model has no number 'tau' that may change; it has \[.*'top_k'"),
        ("num_experts", {0: 1.0}, "the model has no number 'num_experts' that may change"),
        ("top_k", {0: 1, 9: 5}, "top_k=5 must be between 1 and num_experts=4"),
        ("lora_dropout", {0: 1.5}, "lora_dropout=1.5 must be"),
    ],
)
def test_what_may_not_be_is_refused_before_the_first_step(name, points, message, tmp_path):
    trainer = attach(trainer_of(tmp_path))
    trainer.add_callback(ScheduledValue(name, points))
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("points", [{}, {-1: 1.0}, {0: float("nan")}, {0: True}, [1]])
def test_points_that_make_no_sense_are_refused(points):
    with pytest.raises(ValueError, match="must map optimizer steps"):
        ScheduledValue("top_k", points)
    with pytest.raises(ValueError, match="must be a number's name"):
        ScheduledValue("", {0: 1})
