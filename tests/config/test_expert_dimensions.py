"""Which dimensions count experts is what changes when there is one more."""

from __future__ import annotations

import pytest

from moe_peft import MoloraConfig, MovConfig, RoutedConfig
from moe_peft.config.expert_dimensions import expert_dimensions, resized
from moe_peft.place import Place


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MoloraConfig(num_experts=4, r=4), {("experts", "A"): [0], ("experts", "B"): [0], ("router", "weight"): [0]}),
        (MovConfig(num_experts=4), {("experts", "vectors"): [0], ("router", "weight"): [0]}),
        (RoutedConfig(num_experts=4, r=4, experts="shared_down"), {("experts", "A"): [], ("experts", "B"): [0]}),
    ],
)
def test_dimensions_are_found_where_sizes_are_equal_too(config, expected):
    found = expert_dimensions(config, Place("any", 4, 4))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("fields", "tensor"),
    [({"scorer": "tree"}, r"Tree: weight of shape \(3, 4\)"), ({"scorer": "product_keys"}, "row")],
)
def test_tensors_without_a_row_for_each_expert_are_refused(fields, tensor):
    with pytest.raises(ValueError, match=tensor):
        expert_dimensions(RoutedConfig(num_experts=4, **fields), Place("any", 4, 4))


def test_a_token_uses_no_more_experts_than_there_are():
    config = RoutedConfig(num_experts=4, top_k=3, norm_topk_prob=True)
    assert resized(config, 2).top_k == 2 and resized(config, 1).top_k == 1 and config.num_experts == 4
