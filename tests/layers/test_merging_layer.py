"""What every layer does about merging: all of its adapters or none, and the last one out first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_peft import LoraMoeConfig, MoePeftWarning
from tests.layers.test_routed_linear import layer_of


def alone() -> LoraMoeConfig:
    """One expert, whose weight is one whatever the input is."""
    return LoraMoeConfig(target_modules=["0"], num_experts=1)


def test_merging_several_experts_is_refused_by_the_layer_too():
    layer = layer_of(nn.Linear(12, 8))
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="weighs its experts by the input"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before)


def test_rescaling_is_ignored_with_a_warning():
    layer = layer_of(nn.Linear(12, 8))
    layer.scale_layer(1)
    with pytest.warns(MoePeftWarning, match="scale=2 is ignored"):
        layer.scale_layer(2)


def test_names_that_a_layer_does_not_hold_are_left_out_of_its_merge():
    layer = layer_of(nn.Linear(12, 8), alone())
    before = layer.base_layer.weight.clone()
    layer.merge(adapter_names=["elsewhere"])
    assert not layer.merged and torch.equal(layer.base_layer.weight, before)
    layer.merge(adapter_names=["elsewhere", "default", "default"])
    assert layer.merged_adapters == ["default"]


def test_what_was_merged_comes_out_again_and_no_more_than_that():
    layer = layer_of(nn.Linear(12, 8).double(), alone())
    before = layer.base_layer.weight.clone()
    layer.merge()
    assert not torch.equal(layer.base_layer.weight, before)
    layer.unmerge()
    with pytest.warns(MoePeftWarning, match="Already unmerged"):
        layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before)
