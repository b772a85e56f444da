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


@pytest.mark.parametrize("config", [LoraMoeConfig, RoutedConfig])
def test_expert_groups_of_another_length_are_refused(config):
    with pytest.raises(ValueError, match=r"expert_groups=\[1, 0\] must be one group per expert, that is 4 integers"):
        config(num_experts=4, expert_groups=[1, 0])


@pytest.mark.parametrize("config", [LoraMoeConfig, RoutedConfig])
def test_one_expert_group_is_refused(config):
    with pytest.raises(ValueError, match="at least two groups, or None"):
        config(num_experts=3, expert_groups=[1, 1, 1])


@pytest.mark.parametrize("config", [LoraMoeConfig, RoutedConfig])
def test_three_expert_groups_are_refused_in_the_paper_mode_alone(config):
    fields = {"num_experts": 3, "expert_groups": [0, 1, 2]}
    if config is RoutedConfig:
        fields["losses"] = {"localized_balancing": 0.1}
    with pytest.raises(ValueError, match="for more groups set localized_balancing_mode='specialize'"):
        config(**fields)
    assert config(**fields, localized_balancing_mode="specialize").expert_groups == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"localized_balancing_delta": 1.1}, "localized_balancing_delta=1.1 must be a number from 0 to 1"),
        ({"localized_balancing_mode": "code"}, "must be one of 'paper', 'specialize'"),
        ({"group_column": ""}, "group_column='' must be the name of a batch column"),
    ],
)
def test_wrong_field_of_localized_balancing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraMoeConfig(**fields)


@pytest.mark.parametrize("fields", [{"localized_balancing_delta": 0.3}, {"localized_balancing_mode": "specialize"}])
def test_localized_fields_without_groups_warn(fields):
    with pytest.warns(MoePeftWarning, match="have no effect without expert_groups; give the group of each expert"):
        LoraMoeConfig(**fields)
