"""The group of each sample reaches the batch, past collators that keep only what they know."""

from __future__ import annotations

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moe_peft.integrations import GroupCollator

EXAMPLES = [
    {"input_ids": [3, 4, 5], "task_type": 1},
    {"input_ids": [6, 7], "task_type": 0},
    {"input_ids": [8], "task_type": 1},
]


def test_groups_join_the_inner_collators_batch():
    batch = GroupCollator(DataCollatorForLanguageModeling(pad_token_id=0))(EXAMPLES)
    assert batch["input_ids"].shape == (3, 3)
    assert torch.equal(batch["task_type"], torch.tensor([1, 0, 1]))


def test_padding_free_rows_carry_a_group_per_token():
    batch = GroupCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))(EXAMPLES)
    assert torch.equal(batch["task_type"], torch.tensor([[1, 1, 1, 0, 0, 1]]))


def test_examples_without_the_column_are_refused():
    collator = GroupCollator(DataCollatorForLanguageModeling(pad_token_id=0), "domain")
    message = r"3 of 3 examples have no column 'domain'.*group_column.*expert_groups.*remove_unused_columns=False"
    with pytest.raises(ValueError, match=message):
        collator(EXAMPLES)


def test_rows_that_join_examples_without_segments_are_refused():
    with pytest.raises(ValueError, match="made 1 rows of 3 examples"):
        GroupCollator(lambda examples: {"input_ids": torch.ones(1, 6)})(EXAMPLES)


@pytest.mark.parametrize("value", ["law", 0.5, None, [1]])
def test_a_group_that_is_no_integer_is_refused(value):
    examples = [*EXAMPLES, {"input_ids": [9], "task_type": value}]
    with pytest.raises(ValueError, match=r"'task_type' holds .* which is no group. Give one integer per example"):
        GroupCollator(DataCollatorForLanguageModeling(pad_token_id=0))(examples)
