"""After each optimizer step parts learn what was decided, not after skipped ones; coefficients survive resuming."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_peft import CoefficientSchedule, MoeCallback, RoutedConfig, attach
from moe_peft.forward.tracker import find_tracker
from moe_peft.integrations.adaptive import AdaptiveCoefficients
from moe_peft.losses import LOSSES
from moe_peft.types import RouterLoss
from tests.contract.cases import randomize
from tests.integrations.test_callback import rows
from tests.tiny import tiny_llama

START, FACTOR = 0.1, 1.25


class Growing(RouterLoss):
    """Mean gate mass of the first expert, whose coefficient grows by a factor in every step that has seen tokens."""

    adapts = True

    def sums(self, routing):
        return torch.stack([routing.probs[:, 0].sum(), routing.probs.new_tensor(float(len(routing.probs)))])

    @staticmethod
    def value(sums):
        return sums[..., 0] / sums[..., 1]

    def adapt(self, coefficient, statistics):
        return coefficient * FACTOR if sum(float(s.tokens) for s in statistics) > 0 else coefficient


@pytest.fixture
def growing(monkeypatch):
    monkeypatch.setitem(LOSSES, "growing", Growing)


def adapted():
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=4, r=2, losses={"growing": START}))
    randomize(model)
    return model


def trainer_of(folder, callbacks=(), model=None, **fields):
    settings = {
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **fields,
    }
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows(8)])
    args = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model=model or adapted(), args=args, train_dataset=data, callbacks=list(callbacks))


class Watch(TrainerCallback):
    """Reads the coefficient at the end of every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(AdaptiveCoefficients.of(kwargs["model"]).get()["default/growing"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_coefficients_adapt_once_per_step_and_are_the_configured_ones_after_training(growing, accumulation, tmp_path):
    watch = Watch()
    trainer = trainer_of(tmp_path, [watch], gradient_accumulation_steps=accumulation)
    attach(trainer).train()
    assert watch.seen == pytest.approx([START * FACTOR**step for step in (1, 2, 3, 4)])
    assert AdaptiveCoefficients.of(trainer.model).get() == {"default/growing": START}


@pytest.mark.parametrize("restored", [False, True])
def test_coefficients_survive_resuming(growing, restored, tmp_path):
    attach(trainer_of(tmp_path, save_strategy="steps", save_steps=2)).train()
    watch = Watch()
    resumed = trainer_of(tmp_path, [watch], restore_callback_states_from_checkpoint=restored)
    attach(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert watch.seen == pytest.approx([START * FACTOR**step for step in (3, 4)])
    assert any(key.startswith("moe/") for entry in resumed.state.log_history for key in entry)


def test_the_callback_alone_adapts_too(growing, tmp_path):
    watch = Watch()
    trainer_of(tmp_path, [MoeCallback(), watch]).train()
    assert watch.seen[-1] == pytest.approx(START * FACTOR**4)


def test_skipped_steps_do_not_count(growing, tmp_path):
    class Skip(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            kwargs["optimizer"]._is_overflow = state.global_step == 1

    watch = Watch()
    trainer = trainer_of(tmp_path, [watch])
    attach(trainer)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, MoeCallback))
    own = callback.on_optimizer_step

    def on_optimizer_step(args, state, control, **kwargs):
        skipped = nn.Module()
        skipped.step_was_skipped = state.global_step == 1
        return own(args, state, control, **{**kwargs, "optimizer": skipped})

    callback.on_optimizer_step = on_optimizer_step
    trainer.train()
    assert watch.seen == pytest.approx([START * FACTOR**step for step in (1, 1, 2, 3)])
    assert find_tracker(trainer.model).counted == {}


def test_an_interrupted_run_leaves_the_configured_coefficient_and_no_decision(growing, tmp_path):
    class Stop(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = attach(trainer_of(tmp_path, [Stop()]))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert AdaptiveCoefficients.of(trainer.model).get() == {"default/growing": START}
    assert find_tracker(trainer.model).counted == {}


def test_a_schedule_of_a_loss_that_adapts_is_refused(growing, tmp_path):
    trainer = attach(trainer_of(tmp_path, [CoefficientSchedule("growing", {0: 1.0, 2: 0.5})]))
    with pytest.raises(ValueError, match="the loss 'growing' changes its own coefficient"):
        trainer.train()


def test_names_that_are_not_there_are_left_out(growing):
    coefficients = AdaptiveCoefficients.of(adapted())
    coefficients.set({"default/growing": 0.7, "other/growing": 1.0})
    assert coefficients.get() == {"default/growing": 0.7}
    coefficients.restore()
    assert coefficients.get() == {"default/growing": START}
