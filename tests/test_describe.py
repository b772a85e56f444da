"""The dry run: what it tells, and that it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_peft import LoraMoeConfig, RoutedConfig, SiraConfig, describe
from tests.tiny import tiny_llama


def test_describing_changes_neither_model_nor_configuration():
    model, config = tiny_llama(), LoraMoeConfig()
    before, fields = copy.deepcopy(model.state_dict()), copy.deepcopy(config.to_dict())
    description = describe(model, config)
    assert config.to_dict() == fields and config.target_modules is None
    assert set(dict(model.named_modules())) == set(dict(tiny_llama().named_modules()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    adapted = get_peft_model(model, config)
    assert description.num_parameters == adapted.get_nb_trainable_parameters()[0]


def test_description_prints_a_line_per_place_and_the_total():
    text = str(describe(tiny_llama(), LoraMoeConfig(num_experts=3, r=2)))
    lines = text.splitlines()
    assert lines[0].split() == ["place", "layer", "in", "->", "out", "trainable"]
    assert lines[1].split() == ["model.layers.0.mlp.gate_proj", "Linear", "32", "->", "48", "576"]
    assert "3 experts of rank 2, router dense; 6 places, 3,552 trainable parameters" in lines[-1]


def test_an_adapted_model_can_be_described_for_a_second_adapter():
    model = get_peft_model(tiny_llama(), LoraMoeConfig())
    description = describe(model.base_model.model, LoraMoeConfig(target_modules=["down_proj"], num_experts=2))
    assert [place.kind for place in description.places] == ["Linear", "Linear"]


def test_what_a_sparse_adapter_uses_is_told():
    assert "16 experts of rank 4, router capacity, top 4" in str(describe(tiny_llama(), SiraConfig()))


def test_what_is_no_model_or_no_configuration_is_refused():
    with pytest.raises(ValueError, match=r"model='org/name' is no model. Load it first"):
        describe("org/name", LoraMoeConfig())
    for config in (LoraConfig(), LoraMoeConfig):
        with pytest.raises(ValueError, match=r"is no configuration of moe_peft. Give an instance"):
            describe(tiny_llama(), config)


@pytest.mark.parametrize(
    "fields", [{"router": "bias_balanced"}, {"scorer": "fixed_random"}, {"scorer": "centroid"}], ids=str
)
def test_tensors_that_never_train_are_not_counted_as_trainable(fields):
    config = RoutedConfig(num_experts=3, r=2, **fields)
    counted = describe(tiny_llama(), config).num_parameters
    assert counted == get_peft_model(tiny_llama(), config).get_nb_trainable_parameters()[0]
