"""Fields of localized balancing: what they mean together, and which column of the batch they name."""

from __future__ import annotations

import pytest

from moe_peft import LoraMoeConfig, MoePeftWarning, RoutedConfig

GROUPS = [1, 1, 0, 0]


@pytest.mark.parametrize("config", [LoraMoeConfig, RoutedConfig])
def test_the_column_is_read_in_any_case_and_its_groups_are_those_that_own_experts(config):
    assert config(num_experts=4).group_columns == {"task_type": frozenset()}
    own = {"losses": {"localized_balancing": 0.1}} if config is RoutedConfig else {}
    grouped = config(num_experts=4, expert_groups=GROUPS, group_column="domain", **own)
    assert grouped.group_columns == {"domain": frozenset({0, 1})}


def test_the_loss_has_the_numbers_of_the_configuration():
    loss = LoraMoeConfig(num_experts=4, expert_groups=GROUPS, localized_balancing_delta=0.3).localized_balancing()
    assert loss.expert_groups == tuple(GROUPS) and loss.delta == 0.3 and loss.group_column == "task_type"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_groups": [0, 0, 0, 0]}, "expert_groups=.* of at least two groups"),
        ({"expert_groups": [0, 1, 2, 3]}, "expert_groups=.* localized_balancing_mode='specialize'"),
        ({"localized_balancing_delta": 1.5}, "localized_balancing_delta=1.5 must be a number from 0 to 1"),
        ({"localized_balancing_mode": "own"}, "localized_balancing_mode='own' must be one of 'paper', 'specialize'"),
        ({"group_column": ""}, "group_column='' must be the name of a batch column"),
    ],
)
def test_what_has_no_meaning_together_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraMoeConfig(num_experts=4, **fields)
    LoraMoeConfig(num_experts=4, expert_groups=[0, 1, 2, 3], localized_balancing_mode="specialize")


def test_strength_without_groups_is_said_to_have_no_effect():
    with pytest.warns(MoePeftWarning, match="have no effect without expert_groups"):
        LoraMoeConfig(localized_balancing_mode="specialize")
