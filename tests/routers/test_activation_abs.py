"""Scores by the size of activations: the formula, on a layer whose experts are single rows."""

from __future__ import annotations

import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.routers import TopK
from moe_peft.routers.activation_abs import ActivationAbs
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.tiny import OneLinear

E, R, T = 4, 3, 13


def test_equals_the_formula():
    torch.manual_seed(0)
    h = torch.randn(T, E, R, dtype=torch.float64, requires_grad=True)
    routing = ActivationAbs(7, E, select=TopK(top_k=2))(h, TokenContext())
    expected = torch.stack([sum(h[:, e, i].abs() for i in range(R)) / R for e in range(E)], -1)
    assert_same(routing.logits, expected, [h], [h])


def test_fixed_rows_choose_the_same_experts_whatever_is_trained():
    given = {"experts": "sparse_down", "scorer": "activation_abs", "gate": "relu", "r": 1, "num_experts": 8}
    config = RoutedConfig(target_modules=["linear"], router="bias_balanced", top_k=2, **given)
    (layer,) = routed_layers(get_peft_model(OneLinear(7, 5), config))
    bank, x = layer.experts["default"], torch.randn(T, 7).double()
    expected = (x @ bank.A[:, 0].T.double()).abs().topk(2).indices.sort(-1).values
    for _ in range(2):
        routing = layer.router["default"](bank.activations(bank.prepare(x, TokenContext())), TokenContext())
        assert torch.equal(routing.experts.sort(-1).values, expected)
        bank.B.data.normal_()
