"""A backbone has the same number of weights packed or not, with adapters or without."""

from __future__ import annotations

import copy

import pytest
from peft import get_peft_model
from torch import nn

from moe_peft.backbone.sizes import num_base_weights
from tests.contract.cases import METHODS, tiny_olmoe
from tests.tiny import tiny_llama


def test_shared_weights_count_once():
    model = tiny_llama(tie_word_embeddings=True)
    assert num_base_weights(model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", ["perft-r", "perft-e", "esft", "mov"])
def test_adapters_do_not_count(method):
    base = tiny_olmoe()
    expected = sum(p.numel() for p in base.parameters())
    model = get_peft_model(copy.deepcopy(base), METHODS[method](task_type="CAUSAL_LM"))
    assert num_base_weights(model) == expected


@pytest.mark.bnb
def test_packed_weights_count_as_what_they_stand_for():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Params4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = tiny_olmoe()
    expected = num_base_weights(model)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name)
        packed = Linear4bit(32, 32, bias=False)
        packed.weight = Params4bit(layer.self_attn.q_proj.weight.data, requires_grad=False)
        layer.self_attn.q_proj = packed.to("cpu")
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert sum(p.numel() for p in model.parameters()) < expected
    assert num_base_weights(model) == expected
