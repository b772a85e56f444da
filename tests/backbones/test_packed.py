"""Adapters on experts that bitsandbytes has packed to four bits, in three layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft.backbone.structure import find_moe_layers
from tests.backbones.cases import METHODS, base_model, batch_for, config_for

parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
pytestmark = pytest.mark.bnb


def packed_model(model_type: str) -> nn.Module:
    model = copy.deepcopy(base_model(model_type))
    for layer in find_moe_layers(model):
        experts = model.get_submodule(layer.experts)
        for name in [name for name, p in experts.named_parameters(recurse=False) if p.dim() == 3]:
            parametrize.replace_parameter_4bit(experts, name)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h"])
def test_adapters_start_at_the_packed_model_and_train(model_type, method):
    base = packed_model(model_type)
    config = config_for(model_type, method)
    batch = batch_for(base)
    expected = base(**batch).logits
    assert not torch.equal(expected, base_model(model_type)(**batch).logits)
    model = get_peft_model(base, config)
    found = model(**batch)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-6 if method == "esft" else 0)
    found.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert any(p.grad.any() for p in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
