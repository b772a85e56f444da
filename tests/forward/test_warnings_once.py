"""What a training loop is warned of, and what looking for it costs; tests/integrations has the loops themselves."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import MoePeftWarning, RoutedConfig, SiraConfig
from tests.tiny import adapted_linear, padded_batch, routed_layer_of, tiny_llama


def test_a_layer_called_outside_the_model_routes_as_in_inference():
    model = adapted_linear(SiraConfig(num_experts=4, capacity_factor=0.1))
    layer = routed_layer_of(model)
    x = torch.randn(9, 7, dtype=torch.float64)
    with pytest.warns(MoePeftWarning, match="router losses, dropout and capacity are off"):
        out = layer(x)
    torch.testing.assert_close(out, model.eval()(x))


def test_a_model_without_router_losses_is_searched_for_parameters_once(monkeypatch):
    model = get_peft_model(tiny_llama(), RoutedConfig(router="constant", num_experts=2, router_aux_loss_coef=0.0))
    base, calls = model.get_base_model(), []
    search = base.named_parameters
    monkeypatch.setattr(base, "named_parameters", lambda *args, **kwargs: calls.append(1) or search(*args, **kwargs))
    for _ in range(4):
        model.train()(**padded_batch([5])).logits.sum().backward()
    assert len(calls) <= 1
