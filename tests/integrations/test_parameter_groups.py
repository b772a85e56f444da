"""Learning rates of routers and of the experts' up matrices: the right groups, schedules, decay and resumption."""

from __future__ import annotations

import re

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from torch.optim import SGD
from transformers import Trainer, TrainingArguments

from moe_peft import MovConfig, RoutedConfig
from moe_peft.integrations import attach
from tests.integrations.test_callback import adapted, rows
from tests.tiny import tiny_llama

LR, ROUTER_LR, RATIO = 1e-3, 5e-4, 16.0


def trainer_of(folder, model=None, optimizers=(None, None), **fields):
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": LR,
            "weight_decay": 0.1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **fields,
        },
    )
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows(8)])
    return Trainer(model=adapted() if model is None else model, args=args, train_dataset=data, optimizers=optimizers)


def rates_of(trainer):
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}


def expected_rate(name):
    return ROUTER_LR if "_router." in name else LR * RATIO if name.endswith(".B") else LR


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_every_parameter_has_its_rate_and_the_trainers_weight_decay(optim, tmp_path):
    plain = trainer_of(tmp_path, optim=optim)
    plain.create_optimizer()
    decay = {id(p): g["weight_decay"] for g in plain.optimizer.param_groups for p in g["params"]}
    decay = {n: decay[id(p)] for n, p in plain.model.named_parameters() if p.requires_grad}
    trainer = attach(trainer_of(tmp_path, optim=optim), router_lr=ROUTER_LR, lora_plus_ratio=RATIO)
    trainer.create_optimizer()
    assert rates_of(trainer) == pytest.approx({name: expected_rate(name) for name in decay})
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    found = {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert found == decay


def test_schedules_scale_every_rate_alike(tmp_path):
    trainer = attach(trainer_of(tmp_path, lr_scheduler_type="linear"), router_lr=ROUTER_LR, lora_plus_ratio=RATIO)
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert all(rate == pytest.approx(0.75 * expected_rate(name)) for name, rate in rates_of(trainer).items())


def test_parameters_that_were_replaced_before_the_optimizer_is_made_are_found(tmp_path):
    trainer = attach(trainer_of(tmp_path), router_lr=ROUTER_LR, lora_plus_ratio=RATIO)
    for module in trainer.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
    trainer.create_optimizer()
    assert all(rate == pytest.approx(expected_rate(name)) for name, rate in rates_of(trainer).items())


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = attach(trainer_of(tmp_path, **settings), router_lr=ROUTER_LR, lora_plus_ratio=RATIO)
    whole.train()
    resumed = attach(trainer_of(tmp_path, **settings), router_lr=ROUTER_LR, lora_plus_ratio=RATIO)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_attaching_again_replaces_the_rates_that_are_given(tmp_path):
    trainer = attach(trainer_of(tmp_path), router_lr=1.0)
    attach(trainer, router_lr=ROUTER_LR, lora_plus_ratio=RATIO).create_optimizer()
    assert all(rate == pytest.approx(expected_rate(name)) for name, rate in rates_of(trainer).items())


def test_attaching_again_keeps_the_rates_that_are_not_given(tmp_path):
    trainer = attach(trainer_of(tmp_path), router_lr=ROUTER_LR)
    attach(attach(trainer, lora_plus_ratio=RATIO)).create_optimizer()
    assert all(rate == pytest.approx(expected_rate(name)) for name, rate in rates_of(trainer).items())
    attach(trainer, router_lr=ROUTER_LR, lora_plus_ratio=RATIO)
    with pytest.raises(ValueError, match="the trainer has its optimizer already"):
        attach(trainer, router_lr=1.0)


@pytest.mark.parametrize("rates", [{"router_lr": 1e-3}, {"router_lr": 1e-3, "lora_plus_ratio": 2.0}])
def test_a_rate_without_a_part_to_train_with_it_is_refused(rates, tmp_path):
    model = get_peft_model(tiny_llama(), RoutedConfig(router="constant", num_experts=4, router_aux_loss_coef=0.0))
    with pytest.raises(ValueError, match=r"router_lr=0.001 fits no parameter: the adapter has no router that learns"):
        attach(trainer_of(tmp_path, model), **rates)
    vectors = get_peft_model(tiny_llama(), MovConfig(num_experts=4))
    with pytest.raises(ValueError, match=r"lora_plus_ratio=2.0 fits no parameter: the adapter has no low-rank"):
        attach(trainer_of(tmp_path, vectors), router_lr=1e-3, lora_plus_ratio=2.0)


@pytest.mark.parametrize("name", ["router_lr", "lora_plus_ratio"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1e-4", True, float("inf"), [1.0]])
def test_values_that_are_not_positive_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be a positive number")):
        attach(trainer_of(tmp_path), **{name: value})


def test_an_optimizer_that_exists_or_groups_by_itself_is_refused(tmp_path):
    model = adapted()
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    with pytest.raises(ValueError, match="the trainer has its optimizer already"):
        attach(trainer_of(tmp_path, model, (optimizer, None)), router_lr=ROUTER_LR)
    trainer = trainer_of(tmp_path)
    trainer.optimizer_cls_and_kwargs = (SGD, {"lr": LR, "params": [{"params": list(trainer.model.parameters())}]})
    with pytest.raises(ValueError, match="which groups the parameters itself"):
        attach(trainer, router_lr=ROUTER_LR)


def test_experts_have_a_rate_of_their_own_and_the_ratio_is_over_it(tmp_path):
    trainer = attach(trainer_of(tmp_path), expert_lr=2e-4, lora_plus_ratio=RATIO)
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            expected = LR if "router" in name else 2e-4 * RATIO if name.endswith(".B") else 2e-4
            assert rates[id(p)] == pytest.approx(expected), name
