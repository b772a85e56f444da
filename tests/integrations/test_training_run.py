"""Whatever ends trainer.train(), the model is a plain loop's again; finished runs rest; the best weights are found."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_peft import CoefficientSchedule, MoeCallback, RoutedConfig, attach
from moe_peft.forward.tracker import find_tracker
from tests.contract.cases import randomize
from tests.integrations.test_callback import rows
from tests.tiny import padded_batch, tiny_llama

COEF = 0.5


def adapted(name="default", base=tiny_llama, **fields):
    model = get_peft_model(base(), RoutedConfig(num_experts=4, router_aux_loss_coef=COEF, **fields), name)
    randomize(model)
    return model


def data(count=8):
    return Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows(count)])


def trainer_of(folder, model=None, callbacks=(), **fields):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **fields,
    }
    args = TrainingArguments(output_dir=str(folder), **settings)
    own = {"model": adapted()} if model is None else {"model": model}
    if callable(model) and not isinstance(model, torch.nn.Module):
        own = {"model_init": model}
    return Trainer(**own, args=args, train_dataset=data(), eval_dataset=data(4), callbacks=list(callbacks))


class Raise(TrainerCallback):
    """Ends training in one of a trainer's events of its second step."""

    def __init__(self, event, error):
        def stop(args, state, control, **kwargs):
            if state.global_step == 1:
                raise error

        setattr(self, event, stop)


def gradient(model):
    """What a plain loop's backward gives the routers."""
    model.zero_grad()
    batch = padded_batch([6, 4])
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "_router." in name}


EVENTS = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: type(e))
@pytest.mark.parametrize("event", EVENTS)
def test_whatever_ends_training_leaves_the_model_to_plain_loops(event, error, tmp_path):
    schedule = CoefficientSchedule("load_balancing", {0: 1.0, 2: 0.1})
    trainer = trainer_of(tmp_path, callbacks=[schedule], learning_rate=0.0)
    model, load_adapter = trainer.model, trainer.model.load_adapter
    expected = gradient(model)
    trainer.callback_handler.add_callback(Raise(event, error))
    attach(trainer)
    with pytest.raises(type(error)):
        trainer.train()
    tracker = find_tracker(model)
    assert (tracker.loss_scale, tracker.window, tracker.managed, tracker.training_observers) == (1.0, None, False, [])
    assert model.load_adapter == load_adapter
    for name, found in gradient(model).items():
        torch.testing.assert_close(found, expected[name])


def test_an_error_between_steps_leaves_nothing_where_the_callback_is_used_alone(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=0.0, callbacks=[MoeCallback()])
    trainer.add_callback(Raise("on_evaluate", RuntimeError("stop")))
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 1
    expected = gradient(trainer.model)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    for name, found in gradient(trainer.model).items():
        torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step"])
def test_an_error_inside_a_window_leaves_nothing_where_the_callback_is_used_alone(event, count, tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=0.0, callbacks=[MoeCallback() for _ in range(count)])
    trainer.add_callback(Raise(event, KeyboardInterrupt()))
    model = trainer.model
    expected = gradient(model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for name, found in gradient(model).items():
        torch.testing.assert_close(found, expected[name])
    tracker = find_tracker(model)
    assert (tracker.loss_scale, tracker.window, tracker.managed, tracker.training_observers) == (1.0, None, False, [])
    second = attach(trainer_of(tmp_path, model, learning_rate=0.0))
    second.train()
    assert second.state.global_step == 4
    for name, found in gradient(model).items():
        torch.testing.assert_close(found, expected[name])


def test_a_callback_that_is_given_twice_weighs_and_measures_as_one(tmp_path):
    seen = []
    for count in (1, 2):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path / str(count), callbacks=[MoeCallback() for _ in range(count)])
        trainer.train()
        seen.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    torch.testing.assert_close(seen[1], seen[0])


def test_a_run_after_an_interrupted_one_measures_its_own_alone(tmp_path):
    first = trainer_of(tmp_path, callbacks=[MoeCallback()])
    first.add_callback(Raise("on_substep_end", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = attach(trainer_of(tmp_path, first.model))
    second.train()
    assert find_tracker(first.model).training_observers == []
    assert second.state.global_step == 4


def test_adapters_loaded_after_training_have_the_dtypes_of_peft(tmp_path):
    def bfloat16():
        return tiny_llama().to(torch.bfloat16)

    adapted("second", bfloat16).save_pretrained(tmp_path)

    def dtypes(attached):
        model = adapted("default", bfloat16)
        trainer = trainer_of(tmp_path / "run", model, max_steps=1, gradient_accumulation_steps=1)
        (attach(trainer) if attached else trainer).train()
        model.load_adapter(str(tmp_path / "second"), "second")
        return {name: p.dtype for name, p in model.named_parameters() if ".second." in name}

    assert dtypes(True) == dtypes(False)


@pytest.mark.parametrize("model_init", [False, True])
def test_resuming_a_finished_run_trains_no_step(model_init, tmp_path):
    fields = {"gradient_accumulation_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-2}
    whole = trainer_of(tmp_path, save_strategy="steps", save_steps=3, max_steps=3, **fields)
    attach(whole).train()
    resumed = attach(trainer_of(tmp_path, (lambda: adapted()) if model_init else None, max_steps=3, **fields))
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == result.global_step == 3
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert find_tracker(resumed.model).loss_scale == 1.0 and not resumed.is_in_train


@pytest.mark.parametrize("names", [["default"], ["mine"], ["default", "mine"]])
def test_the_best_weights_are_found_whatever_the_adapter_is_called(names, tmp_path):
    model = adapted(names[0])
    for name in names[1:]:
        model.add_adapter(name, RoutedConfig(num_experts=4, router_aux_loss_coef=COEF))
    model.set_adapter(names[-1])
    fields = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    # The loss falls in every step, so that the best by this metric is not the last.
    fields |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 1e-2}
    fields |= {"load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    trainer = attach(trainer_of(tmp_path, model, gradient_accumulation_steps=1, **fields))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < max(losses) - 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-5)


def test_every_model_of_model_init_is_prepared_and_left_as_peft_made_it(tmp_path):
    def make():
        model = adapted()
        for name, parameter in model.named_parameters():
            if "_router." in name:
                parameter.data = parameter.data.bfloat16()
        return model

    trainer = attach(trainer_of(tmp_path, make, max_steps=2, save_strategy="steps", save_steps=1))
    trainer.train()
    assert {p.dtype for name, p in trainer.model.named_parameters() if "_router." in name} == {torch.float32}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.model.load_adapter.__func__ is PeftModel.load_adapter
    assert trainer.state.global_step == 2


class Stream(torch.utils.data.IterableDataset):
    """Rows of a stream, which has no length."""

    def __iter__(self):
        yield from ({k: v for k, v in row.items() if k != "task_type"} for row in rows(5))


def test_left_over_micro_batches_of_a_stream_weigh_as_in_the_task_loss(tmp_path):
    """5 micro-batches in windows of 3: the last two of an epoch are a mean of two, as the trainer has it."""
    seen = []

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            seen.append((find_tracker(kwargs["model"]).loss_scale, 1 / trainer.current_gradient_accumulation_steps))

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.on_substep_end(args, state, control, **kwargs)

    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3, max_steps=2)
    trainer.train_dataset = Stream()
    trainer.add_callback(Watch())
    attach(trainer).train()
    assert [scale for scale, _ in seen] == pytest.approx([1 / 3] * 3 + [1 / 2] * 2 + [1 / 3] * 3)
    assert all(scale == pytest.approx(own) for scale, own in seen)


def test_training_twice_with_one_trainer_gives_what_two_trainers_give(tmp_path):
    trainer = attach(trainer_of(tmp_path, max_steps=2))
    trainer.train()
    first = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(p, first[name]) for name, p in trainer.model.named_parameters() if name in first)
