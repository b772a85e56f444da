"""Whatever a failing block did to a model is undone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_peft import RoutedConfig
from moe_peft.tuner.transaction import restorer, unchanged_on_error
from tests.tiny import tiny_llama
from tests.tuner.ways import assert_unchanged, state_of


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_modules_hooks_parameters_and_flags_are_as_before(error):
    model, config = tiny_llama().eval(), RoutedConfig(target_modules=["up_proj"])
    model.extra = {"a": 1}
    handle = model.register_forward_hook(lambda *args: None)
    before, fields = state_of(model), config.to_dict()
    order = list(model.model._modules)
    with pytest.raises(error), unchanged_on_error(model, config):
        config.target_modules = {"down_proj"}
        model.train()
        model.extra["b"] = 2
        model.other = object()
        del model.extra
        handle.remove()
        model.model.layers[0].register_forward_pre_hook(lambda *args: None)
        model.model.norm = nn.Identity()
        model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(2))
        model.requires_grad_(False)
        raise error
    assert_unchanged(model, before)
    assert config.to_dict() == fields and model.extra == {"a": 1} and list(model.model._modules) == order
    handle.remove()
    assert not model._forward_hooks


def test_a_block_that_succeeds_keeps_what_it_did():
    model = nn.Linear(2, 2)
    with unchanged_on_error(model):
        model.mark = 1
    assert model.mark == 1


def test_objects_are_put_back_whatever_they_are():
    layer, state = nn.Linear(2, 2), SimpleNamespace(a=1, names=["x"])
    weight = layer.weight
    restore = restorer(layer, weight, state, None, 3)
    layer.weight, weight.mark, state.a = nn.Parameter(torch.zeros(2, 2)), 1, 2
    state.names.append("y")
    restore()
    assert layer.weight is weight and not hasattr(weight, "mark") and vars(state) == {"a": 1, "names": ["x"]}
