"""Frozen parts stay as they are, optimizer state included, and train again afterwards."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import TrainerCallback

from moe_peft import FreezeCallback
from moe_peft.integrations import attach
from tests.integrations.test_parameter_groups import trainer_of
from tests.tiny import tiny_llama


class Snapshots(TrainerCallback):
    """Weights and Adam's step counts after every optimizer step."""

    def __init__(self):
        self.weights, self.steps = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.weights.append({n: p.detach().clone() for n, p in named.items()})
        self.steps.append({n: int(optimizer.state.get(p, {}).get("step", 0)) for n, p in named.items()})


@pytest.mark.parametrize("part", ["router", "experts"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_part_and_its_optimizer_state_rest_in_the_range(part, accumulation, tmp_path):
    snapshots = Snapshots()
    trainer = attach(trainer_of(tmp_path, gradient_accumulation_steps=accumulation, max_steps=4))
    trainer.add_callback(FreezeCallback(part, first_step=1, last_step=3))
    trainer.add_callback(snapshots)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for name in before:
        frozen = f"_{part}." in name
        history = [before[name]] + [weights[name] for weights in snapshots.weights]
        changed = [not torch.equal(old, new) for old, new in itertools.pairwise(history)]
        assert changed == ([True, False, False, True] if frozen else [True] * 4), name
        assert [steps[name] for steps in snapshots.steps] == ([1, 1, 1, 2] if frozen else [1, 2, 3, 4]), name


def test_a_resumed_run_stays_frozen_to_the_same_step(tmp_path):
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = attach(trainer_of(tmp_path, save_strategy="steps", save_steps=2))
        trainer.add_callback(FreezeCallback("router", last_step=3))
        trainer.train(resume_from_checkpoint=resume)
        runs.append(dict(trainer.model.named_parameters()))
    assert all(torch.equal(parameter, runs[0][name]) for name, parameter in runs[1].items())


def test_wrong_parts_and_ranges_are_refused(tmp_path):
    with pytest.raises(ValueError, match="part='gate' must be one of 'router', 'experts'"):
        FreezeCallback("gate")
    for first, last in ((-1, 3), (3, 3), (4, 2)):
        with pytest.raises(ValueError, match=f"first_step={first} and last_step={last} enclose no step"):
            FreezeCallback("router", first_step=first, last_step=last)


def test_a_model_without_the_part_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, tiny_llama())
    trainer.add_callback(FreezeCallback("router"))
    with pytest.raises(ValueError, match="no adapter of the model has a part 'router'"):
        trainer.train()
