"""The norm of what an expert makes of the input is its score: before dropout, with rows of one size at the start."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers, router_loss
from moe_peft.routers import TopK
from moe_peft.routers.activation_norm import ActivationNorm
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

from .made import D, E, T


def adapted(**fields):
    settings = {"num_experts": E, "r": 3, "target_modules": ["q_proj"], "norm_topk_prob": True, **fields}
    return get_peft_model(tiny_llama(), RoutedConfig(scorer="activation_norm", **settings)).double()


def test_a_layer_equals_the_formula():
    model = adapted().eval()
    randomize(model)
    layer = routed_layers(model)[0]
    bank, x, out = layer.experts["default"], torch.randn(T, 32).double(), torch.randn(T, 32).double()
    expected = []
    for t in range(T):
        z = torch.stack([(x[t] @ bank.A[e].T).square().sum().sqrt() for e in range(E)])
        kept = sorted(range(E), key=lambda e: -z[e].item())[:2]
        weights = z[kept].softmax(-1)
        added = sum(w * (x[t] @ bank.A[e].T @ bank.B[e]) for w, e in zip(weights, kept, strict=True))
        expected.append(out[t] + layer.experts["default"].scaling * added)
    found = layer.add("default", x, out, TokenContext())
    assert_same(found, torch.stack(expected), [bank.A, bank.B], [bank.A, bank.B], 1e-10)
    assert not list(layer.router["default"].parameters())


def test_the_gradient_of_a_zero_input_is_zero():
    made = ActivationNorm(D, E, select=TopK(top_k=2))
    h = torch.zeros(1, E, 3, requires_grad=True)
    made(h, TokenContext()).weights.sum().backward()
    assert torch.equal(h.grad, torch.zeros_like(h))


@pytest.mark.parametrize("experts", ["low_rank", "bottleneck"])
def test_dropout_of_the_experts_decides_about_no_token(experts):
    layer = routed_layers(adapted(lora_dropout=0.5, experts=experts, router_aux_loss_coef=0.0))[0]
    x, decided = torch.randn(T, 32).double(), []
    layer.router["default"].register_forward_hook(lambda _, __, routing: decided.append(routing.logits))
    for training in (False, True):
        layer.add("default", x, torch.zeros(T, 32).double(), TokenContext(training=training))
    assert torch.equal(*decided)


def test_rows_of_all_experts_start_with_one_norm():
    norms = torch.linalg.vector_norm(routed_layers(adapted())[0].experts["default"].A, dim=-1)
    torch.testing.assert_close(norms, norms.mean().expand_as(norms))


def test_the_balance_loss_trains_the_experts_that_score():
    model, batch = adapted(router_aux_loss_coef=0.1).train(), padded_batch([5, 3])
    layer = routed_layers(model)[0]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert router_loss(model) > 0
    assert layer.experts["default"].A.grad.abs().sum() > 0  # B is zero, so that the task says nothing of A


def test_experts_without_activations_of_their_own_are_refused():
    for experts in ("shared_down", "cp_diagonal", "latent_core"):
        with pytest.raises(ValueError, match=r"scorer='activation_norm' must be one that needs no activations.*low"):
            RoutedConfig(scorer="activation_norm", experts=experts)
