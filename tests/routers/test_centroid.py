"""Routing to the nearest of fixed vectors, of either sign where that is asked for; nothing of it trains."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.routers import TopK
from moe_peft.routers.centroid import Centroid
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.tiny import tiny_llama

from .made import D, E, T, rows


@pytest.mark.parametrize("sign_agnostic", [False, True])
def test_equals_the_formula(sign_agnostic):
    torch.manual_seed(0)
    made = Centroid(D, E, select=TopK(top_k=2), tau=0.3, sign_agnostic=sign_agnostic).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    z = [[(x[t] * c).sum() / (x[t].norm() * c.norm()) / 0.3 for c in made.weight] for t in range(T)]
    expected = rows(z).abs() if sign_agnostic else rows(z)
    routing = made(x, TokenContext())
    assert_same(routing.logits, expected, [x], [x])
    torch.testing.assert_close(routing.weights, expected.softmax(-1).topk(2).values)


def test_a_zero_input_has_finite_scores_and_gradients():
    made, x = Centroid(D, E, select=TopK(top_k=2)), torch.zeros(1, D, requires_grad=True)
    made(x, TokenContext()).weights.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_nothing_of_it_trains_and_router_losses_are_refused():
    config = RoutedConfig(scorer="centroid", num_experts=E, r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(), config)
    assert all(not p.requires_grad for layer in routed_layers(model) for p in layer.router["default"].parameters())
    with pytest.raises(ValueError, match="learns nothing"):
        RoutedConfig(scorer="centroid", losses={"importance": 0.1})
