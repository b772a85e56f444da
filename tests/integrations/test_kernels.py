"""Kernels that replace forwards: an adapter that would take no part is refused by name, and the others train."""

from __future__ import annotations

import functools
from types import MethodType

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from moe_peft import EsftConfig, ExpertLoraConfig, PerftConfig, RoutedConfig, attach
from moe_peft.forward.tracker import find_tracker
from moe_peft.integrations.kernels import check_kernels
from moe_peft.layers import RoutedLayer
from tests.contract.cases import randomize
from tests.integrations.test_callback import rows
from tests.tiny import padded_batch, tiny_llama, tiny_mixtral

SMALL = {"num_experts": 4, "top_k": 2, "r": 2, "router_aux_loss_coef": 1.0}
WRAPPED = {
    "mlp": (tiny_llama, PerftConfig(num_experts=4, r=2)),
    "experts": (tiny_mixtral, PerftConfig(variant="E", r=2)),
    "slices": (tiny_mixtral, EsftConfig(experts={"0": [0], "1": [1]})),
    "pairs": (tiny_mixtral, ExpertLoraConfig(r=2)),
}


def other_forward(self, *args, **kwargs):
    """A forward as kernels have it: made for the class that the adapter wraps."""
    return args[0]


def fused_loss(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
    """The loss from the hidden states and the weight of the output layer, which is not called."""
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    logits = (hidden @ self.lm_head.weight.t()).float()
    return {"loss": self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)}


fused_loss.__module__ = "liger_kernel.transformers.model.llama"


def trainer_of(folder, model):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    settings |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "optim": "sgd", "learning_rate": 1e-2}
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows(8)])
    return Trainer(model=model, args=TrainingArguments(str(folder), **settings), train_dataset=data)


@pytest.mark.parametrize("name", WRAPPED)
def test_an_adapter_whose_forward_was_replaced_is_refused_by_its_place(name, tmp_path):
    make, config = WRAPPED[name]
    model = get_peft_model(make(), config)
    check_kernels(model)
    layer = next(module for module in model.modules() if isinstance(module, RoutedLayer))
    layer.__dict__["forward"] = MethodType(other_forward, layer)
    trainer = trainer_of(tmp_path, model)
    callbacks = len(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match=rf"layer '{layer.place}'.*replaced by 'other_forward'.*'swiglu': False"):
        attach(trainer)
    assert len(trainer.callback_handler.callbacks) == callbacks


def test_wrappers_that_call_the_layer_and_kernels_inside_of_it_are_none():
    model = get_peft_model(tiny_llama(), PerftConfig(num_experts=4, r=2))
    layer = next(module for module in model.modules() if isinstance(module, RoutedLayer))
    layer.forward = functools.partial(lambda own, *args, **kwargs: own(*args, **kwargs), layer.forward)
    layer.base_layer.__dict__["forward"] = MethodType(other_forward, layer.base_layer)
    check_kernels(model)


@pytest.mark.parametrize("where", ["before", "after", "class"])
def test_an_adapter_of_an_output_layer_that_is_read_is_refused(where, tmp_path, monkeypatch):
    base = tiny_llama()
    if where == "class":
        monkeypatch.setattr(type(base), "forward", fused_loss)
    if where == "before":
        base.forward = MethodType(fused_loss, base)
    model = get_peft_model(base, RoutedConfig(**SMALL, target_modules=["lm_head", "up_proj"]))
    if where == "after":
        base.forward = MethodType(fused_loss, base)
    with pytest.raises(ValueError, match=r"weight of 'lm_head'.*'fused_linear_cross_entropy': False"):
        attach(trainer_of(tmp_path, model))


def test_router_losses_are_in_the_gradient_of_a_fused_loss(tmp_path):
    def trained(fused):
        model = get_peft_model(tiny_llama(), RoutedConfig(**SMALL, target_modules=["up_proj", "q_proj"]))
        randomize(model)
        if fused:
            base = model.get_base_model()
            base.forward = MethodType(fused_loss, base)
        attach(trainer_of(tmp_path, model)).train()
        assert find_tracker(model).loss_scale == 1.0
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    expected = trained(False)
    for name, parameter in trained(True).items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-8)


def test_an_interrupt_inside_a_fused_loss_leaves_the_next_forward_alone(tmp_path):
    model = get_peft_model(tiny_llama(), RoutedConfig(**SMALL)).train()
    batch = {**padded_batch([6, 4])}
    expected = model(**batch, labels=batch["input_ids"]).loss

    def interrupted(self, **kwargs):
        self.model(**kwargs)
        raise KeyboardInterrupt

    base = model.get_base_model()
    kept = base.forward
    base.forward = MethodType(interrupted, base)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    base.forward = kept
    assert torch.equal(model(**batch, labels=batch["input_ids"]).loss, expected)
