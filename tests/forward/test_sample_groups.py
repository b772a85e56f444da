"""Further knowledge of a forward, served where a part asks: groups, token ids, prompts, cache, in evaluation too."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_peft
from moe_peft import LoraMoeConfig, PerftConfig, RoutedConfig
from moe_peft.forward.tracker import find_tracker
from moe_peft.layers import RoutedLayer
from moe_peft.types import TokenContext
from tests.tiny import padded_batch, tiny_llama, tiny_t5


def asking(*needs, base=None, config=None):
    """A model whose routers' contexts are collected without any observer."""
    config = config or LoraMoeConfig(num_experts=2, expert_groups=[1, 0], init_weights=False)
    model = get_peft_model(base or tiny_llama(), config).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            module.tracker.need(frozenset(needs))
            for router in module.router.values():
                router.register_forward_pre_hook(lambda router, args: seen.append(args[1]))
    return model, seen


def test_without_a_part_that_asks_evaluation_makes_no_context():
    model, seen = asking()
    model(**padded_batch([3, 5]), task_type=[1, 0])
    assert seen and all(context == TokenContext() for context in seen)


def test_evaluation_serves_what_is_asked_for():
    model, seen = asking("groups", "token_ids")
    batch = padded_batch([3, 5])
    model(**batch, task_type=[1, 0])
    for context in seen:
        assert not context.training and context.groups.tolist() == [1, 0]
        assert torch.equal(context.token_ids, batch["input_ids"].reshape(-1)) and context.prompt is None
        assert torch.equal(context.valid, batch["attention_mask"].reshape(-1).bool())
    with pytest.raises(ValueError, match=r"holds the sample groups \[7\]"):
        model(**batch, task_type=[7, 0])


def test_prompts_end_at_the_first_label():
    model, seen = asking("prompt")
    batch = padded_batch([4, 5])
    labels = batch["input_ids"].clone()
    labels[0, :2] = labels[1, :4] = -100
    labels[0, 3] = -100
    model(**batch, labels=labels)
    assert seen[0].prompt.view(2, 5).tolist() == [[True, True, False, False, False], [True] * 4 + [False]]
    assert seen[0].token_ids is None


@pytest.mark.parametrize("fields", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_generation_is_given_groups_by_a_context(make, fields):
    model, seen = asking("groups", "cached", base=make())
    batch = padded_batch([3, 5], side="left")
    with moe_peft.groups(model, task_type=[1, 0]):
        model.generate(**batch, max_new_tokens=3, **fields)
    times = fields.get("num_beams", 1) * fields.get("num_return_sequences", 1)
    expected = {(1, 0), tuple([1] * times + [0] * times)}
    assert seen and {tuple(context.groups.tolist()) for context in seen} <= expected
    assert expected == {tuple(context.groups.tolist()) for context in seen} or make is tiny_llama
    assert max(context.cached for context in seen) > 0
    seen.clear()
    model(**batch, **({"decoder_input_ids": batch["input_ids"]} if make is tiny_t5 else {}))
    assert all(context.groups is None for context in seen)


def test_a_batch_with_the_column_is_taken_at_its_word():
    model, seen = asking("groups")
    with moe_peft.groups(model, task_type=[1, 1]), moe_peft.groups(model, task_type=[0, 0]):
        model(**padded_batch([3, 5]), task_type=[1, 0])
        model(**padded_batch([3, 5]))
    assert {tuple(context.groups.tolist()) for context in seen} == {(1, 0), (0, 0)}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"domain": [0]}, r"reads sample groups from 'domain'; those that are read are \['task_type'\]"),
        ({"task_type": [7]}, r"holds the sample groups \[7\]"),
        ({"task_type": ["law"]}, "must hold the group of every sample as an integer"),
    ],
)
def test_groups_that_nobody_reads_are_refused(columns, message):
    model, _ = asking("groups")
    with pytest.raises(ValueError, match=message), moe_peft.groups(model, **columns):
        raise AssertionError("entered")
    with pytest.raises(TypeError, match="must be a torch"), moe_peft.groups(None, **columns):
        raise AssertionError("entered")


@pytest.mark.parametrize("config", [RoutedConfig(num_experts=2), PerftConfig(num_experts=2, top_k=1, r=2)])
def test_rows_of_mixed_adapters_have_their_own_context(config):
    model, seen = asking("token_ids", "groups", config=config)
    find_tracker(model).group_columns["task_type"] = frozenset()
    batch = padded_batch([3, 5, 4])
    model(**batch, task_type=[4, 5, 6], adapter_names=["default", "__base__", "default"])
    for context in seen:
        assert torch.equal(context.token_ids, batch["input_ids"][[0, 2]].reshape(-1))
        assert torch.equal(context.valid, batch["attention_mask"][[0, 2]].reshape(-1).bool())
        assert context.sequences.tolist() == [0] * 5 + [1] * 5 and context.groups.tolist() == [4, 6]


def test_decisions_of_a_block_are_kept_within_one_pass():
    model, _ = asking()
    tracker, kept = find_tracker(model), []
    first, last = ([m for m in model.modules() if isinstance(m, RoutedLayer)][n] for n in (0, -1))
    first.register_forward_hook(lambda *args: kept.append(dict(tracker.led)) or tracker.led.update(block=1))
    last.register_forward_hook(lambda *args: kept.append(dict(tracker.led)))
    for _ in range(2):
        model(**padded_batch([3]))
    assert kept == [{}, {"block": 1}] * 2 and tracker.led == {}
