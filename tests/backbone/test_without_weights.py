"""A model on the meta device is of the class that a checkpoint names, with a score head where rewards are learned."""

from __future__ import annotations

import pytest

from moe_peft.backbone.without_weights import meta_model
from tests.tiny import tiny_llama, tiny_mixtral, tiny_t5


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral, tiny_t5])
def test_it_has_the_models_parameters_without_memory(make):
    model = make()
    model.config.architectures = [type(model).__name__]
    found = meta_model(model.config)
    assert type(found) is type(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in found.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in found.parameters())


def test_a_reward_model_has_one_output():
    found = meta_model(tiny_llama().config, "SEQ_CLS")
    assert found.score.weight.shape == (1, 32) and found.score.weight.is_meta
