"""A random matrix that never trains and is a part of the adapter."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.routers import LinearRouter, TopK
from moe_peft.routers.fixed_random import FixedRandomRouter
from moe_peft.types import TokenContext
from tests.tiny import padded_batch, tiny_llama

from .made import D, E, T


def test_scores_are_linear_and_experts_join_as_k_grows():
    torch.manual_seed(0)
    made, plain, x = FixedRandomRouter(D, E, select=TopK(top_k=2)), LinearRouter(D, E, select=TopK(top_k=2)), None
    plain.weight.data = made.weight.data.clone()
    x = torch.randn(T, D)
    assert torch.equal(made(x, TokenContext()).logits, plain(x, TokenContext()).logits)
    few = made(x, TokenContext()).request_matrix()
    made.select.top_k = 3
    assert (made(x, TokenContext()).request_matrix() >= few).all()


def test_it_never_trains_and_router_losses_are_refused():
    config = RoutedConfig(scorer="fixed_random", num_experts=E, r=2, target_modules=["q_proj"])
    model, batch = get_peft_model(tiny_llama(), config).train(), padded_batch([5, 3])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for layer in routed_layers(model):
        assert layer.router["default"].weight.grad is None and layer.experts["default"].B.grad.any()
    assert any(name.endswith("router.default.weight") for name in model.state_dict())
    with pytest.raises(ValueError, match="learns nothing"):
        RoutedConfig(scorer="fixed_random", losses={"importance": 0.1})
