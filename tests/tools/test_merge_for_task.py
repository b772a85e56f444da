"""An adapter by task merges exactly for each of its tasks, or stays as it was."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig
from moe_peft.tools import merge_for_task
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

TABLE = {"scorer": "task_table", "router": "top_k", "num_experts": 3, "r": 2, "router_args": {"num_tasks": 3}}


def adapted(**fields):
    model = get_peft_model(tiny_llama(), RoutedConfig(task_type="CAUSAL_LM", **{**TABLE, **fields})).double().eval()
    randomize(model)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router": "dense", "router_args": {"num_tasks": 3, "width": 2}},
        {"router_scope": "block", "experts": "shared_down"},
        {"experts_args": {"shared": 1}},
        {"router": "dense", "gate": "relaxed_bernoulli"},
        {"router": "dense", "gate": "gumbel", "router_args": {"num_tasks": 3, "width": 2, "hard": True}},
        {"router": "dense", "router_args": {"num_tasks": 3, "task_mask": [[1, 1, 0], [0, 1, 1], [0, 0, 1]]}},
        {"router": "expert_prototyping", "gate": "entmax"},
    ],
)
def test_the_merged_model_equals_the_adapted_one_on_the_task(fields):
    batch = padded_batch([5, 3])
    for task in (0, 2):
        model = adapted(**fields)
        with torch.no_grad():
            expected = model(**batch, task_type=torch.tensor([task, task])).logits
            merged = merge_for_task(model, task)
            torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-9, atol=1e-9)
        assert not any("routed" in name for name in merged.state_dict())


@pytest.mark.parametrize(
    ("fields", "task", "message"),
    [
        ({}, 7, "num_tasks=3, but a sample is of task 7"),
        ({}, True, "task=True must be a whole number"),
        ({"scorer": "linear", "router_args": None}, 0, "decides by the tokens at .*, not by the task alone"),
        ({"experts": "bottleneck"}, 0, "cannot be merged"),
        ({"wraps": "block"}, 0, "cannot be merged"),
    ],
)
def test_what_is_no_fixed_weight_is_refused_and_nothing_changes(fields, task, message):
    model, batch = adapted(**fields), {**padded_batch([5, 3]), "task_type": torch.tensor([0, 1])}
    with torch.no_grad():
        before, tensors = model(**batch).logits, {key: own.clone() for key, own in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            merge_for_task(model, task)
        assert torch.equal(model(**batch).logits, before)
    assert all(torch.equal(own, tensors[key]) for key, own in model.state_dict().items())


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match="is no PeftModel"):
        merge_for_task(tiny_llama(), 0)
    with pytest.raises(ValueError, match=r"no layer holds a router of the adapter 'other'; there are \['default'\]"):
        merge_for_task(adapted(), 0, "other")
