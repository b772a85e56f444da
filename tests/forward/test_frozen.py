"""What a part never trains gets no gradient, whoever has let all parameters of a model train."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from moe_peft import RoutedConfig, attach
from moe_peft.part import ModulePart
from tests.tiny import padded_batch, tiny_llama

CASES = {
    "scorer": {"scorer": "fixed_random"},
    "experts": {"experts": "sparse_down"},
}


def model_of(case, **fields):
    return get_peft_model(
        tiny_llama(), RoutedConfig(num_experts=3, target_modules=["q_proj"], **CASES[case], **fields)
    )


def frozen_tensors(model):
    parts = [part for part in model.modules() if isinstance(part, ModulePart) and part.frozen]
    found = [part.get_parameter(name) for part in parts for name in part.frozen]
    assert found
    return found


def by_method(model):
    model.requires_grad_(True)


def by_loop(model):
    for parameter in model.parameters():
        parameter.requires_grad = True


def train_once(model):
    batch = padded_batch([5, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("unfreeze", [by_method, by_loop])
@pytest.mark.parametrize("case", CASES)
def test_no_optimizer_moves_what_never_trains_though_all_of_the_model_does(case, unfreeze):
    model = model_of(case)
    model(**padded_batch([2]))  # the parts have been looked for before
    unfreeze(model)
    before = [tensor.clone() for tensor in frozen_tensors(model)]
    train_once(model)
    assert all(torch.equal(own, old) for own, old in zip(frozen_tensors(model), before, strict=True))
    assert all(own.grad is None for own in frozen_tensors(model))
    assert model.get_input_embeddings().weight.grad is not None


def test_parts_of_adapters_that_come_later_and_of_copies_are_known():
    model = model_of("scorer")
    train_once(model)
    model.add_adapter("other", RoutedConfig(num_experts=2, target_modules=["v_proj"], scorer="fixed_random"))
    model.base_model.set_adapter(["default", "other"])
    for own in (copy.deepcopy(model), model):
        own.requires_grad_(True)
        count = len(frozen_tensors(own))
        train_once(own)
        assert count == 4 and all(tensor.grad is None for tensor in frozen_tensors(own))


def test_a_model_without_frozen_tensors_trains_whole_where_asked():
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=2)).requires_grad_(True)
    train_once(model)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attach_freezes_before_anything_wraps_the_model(tmp_path):
    model = model_of("experts").requires_grad_(True)
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    attach(Trainer(model=model, args=args))
    assert not any(tensor.requires_grad for tensor in frozen_tensors(model))
