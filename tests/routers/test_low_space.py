"""The linear scorer behind the experts' shared down matrix."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.contract.cases import randomize
from tests.tiny import tiny_llama

from .made import E, T


def layer_of(**fields):
    settings = {"num_experts": E, "r": 3, "target_modules": ["q_proj"], "router": "dense", **fields}
    model = get_peft_model(tiny_llama(), RoutedConfig(scorer="low_space", **settings)).double()
    randomize(model)
    return routed_layers(model)[0]


@pytest.mark.parametrize("experts", ["latent_core", "shared_down", "cp_diagonal"])
def test_scores_are_linear_in_what_the_shared_matrix_makes_of_the_input(experts):
    layer = layer_of(experts=experts)
    bank, router, x = layer.experts["default"], layer.router["default"], torch.randn(T, 32).double()
    assert router.weight.shape == (E, 3)
    z = torch.stack([torch.stack([(router.weight[e] * (bank.A @ x[t])).sum() for e in range(E)]) for t in range(T)])
    decided = []
    router.register_forward_hook(lambda _, __, routing: decided.append(routing.logits))
    layer.add("default", x, torch.zeros(T, 32).double(), TokenContext())
    leaves = [bank.A, router.weight]
    assert_same(decided[0], z, leaves, leaves)


def test_dropout_of_the_experts_decides_about_no_token():
    fields = {"lora_dropout": 0.5, "experts_args": {"down_dropout": 0.5}, "router_aux_loss_coef": 0.0}
    layer = layer_of(experts="shared_down", **fields)
    x, decided = torch.randn(T, 32).double(), []
    layer.router["default"].register_forward_hook(lambda _, __, routing: decided.append(routing.logits))
    for training in (False, True):
        layer.add("default", x, torch.zeros(T, 32).double(), TokenContext(training=training))
    assert torch.equal(*decided)


def test_experts_without_a_shared_matrix_are_refused():
    with pytest.raises(ValueError, match=r"scorer='low_space' must be one that needs no shared_activations.*latent"):
        RoutedConfig(scorer="low_space")
