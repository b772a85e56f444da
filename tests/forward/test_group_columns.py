"""Groups of samples come per sequence or per token, and those that no expert belongs to are named."""

from __future__ import annotations

import pytest
import torch

from moe_peft.forward.group_columns import SampleGroups, check_groups, groups_per_sequence


def test_groups_per_token_become_groups_per_document():
    sequences = torch.tensor([0, 0, 1, 1, 1, 2])
    groups = groups_per_sequence(SampleGroups(torch.tensor([[5, 5, 7, 7, 7, 5]])), sequences, 3, (1, 6))
    assert groups.tolist() == [5, 7, 5]
    with pytest.raises(ValueError, match=r"groups of shape \(4,\), but it holds 3 sequences"):
        groups_per_sequence(SampleGroups(torch.zeros(4).long()), sequences, 3, (1, 6))


def test_groups_without_an_expert_are_named():
    check_groups(torch.tensor([0, 1, 1]), "task_type", frozenset({0, 1}))
    check_groups(torch.tensor([9]), "task_type", frozenset())
    with pytest.raises(ValueError, match=r"'task_type' holds the sample groups \[2, 3\].*known are \[0, 1\]"):
        check_groups(torch.tensor([3, 0, 2]), "task_type", frozenset({0, 1}))
