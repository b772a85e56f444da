"""Experts from the weight's singular vectors: the formula, the start by definition, W0 as it was, merges."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from moe_peft import RoutedConfig, routed_layers
from moe_peft.experts.goat import GoatExperts
from tests.compare import assert_same, random_routing
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_gpt2, tiny_llama

from .bank import OUT, D, E, T, assert_merges

R, SCALING = 1, 1.7


def made(**settings):
    torch.manual_seed(0)
    weight = torch.randn(OUT, D)
    given = {"scaling": SCALING, "init_weights": False, "weight": weight, **settings}
    bank = GoatExperts(D, OUT, num_experts=E, r=R, **given).double()
    nn.init.normal_(bank.dA, std=0.3)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    return bank, x, torch.randn(T, OUT, dtype=torch.float64), weight


@pytest.mark.parametrize("top_k", [None, 2])
def test_adds_what_the_pairs_differ_from_their_start(top_k):
    bank, x, base, _ = made()
    routing = random_routing(T, E, top_k)
    gates, A, B = routing.gate_matrix(), bank.A0 + bank.dA, bank.B0 + bank.dB
    matrices = [SCALING * (B[e].T @ A[e] - bank.B0[e].T @ bank.A0[e]) for e in range(E)]
    expected = base + sum(gates[:, e : e + 1] * (x @ matrices[e].T) for e in range(E))
    leaves = [x, routing.logits, bank.dA, bank.dB]
    assert_same(bank(x, base, routing), expected, leaves, leaves, 1e-10)
    weights = torch.arange(E).double()
    torch.testing.assert_close(bank.delta_weight(weights), sum(w * m for w, m in zip(weights, matrices, strict=True)))


def test_expert_e_starts_with_the_vectors_of_part_e_of_the_spectrum():
    rho = 4.0
    bank, _, _, weight = made(rho=rho)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    for e in range(E):
        expected = values[e] * torch.outer(left[:, e], right[e]) / (SCALING * rho)  # five values make parts of one
        torch.testing.assert_close(bank.B0[e].T @ bank.A0[e], expected, atol=1e-5, rtol=1e-4)


def test_it_starts_as_the_identity_bit_for_bit_and_trains_differences_alone():
    model, batch = tiny_llama().eval(), padded_batch([5, 3])
    weight, expected = model.model.layers[0].mlp.up_proj.weight.clone(), model(**batch).logits
    model = get_peft_model(model, RoutedConfig(experts="goat", num_experts=3, r=2, target_modules=["up_proj"]))
    layer = routed_layers(model)[0]
    bank = layer.experts["default"]
    assert bank.B0.any() and torch.equal(model.eval()(**batch).logits, expected)
    assert torch.equal(layer.base_layer.weight, weight)
    assert {name for name, p in bank.named_parameters() if p.requires_grad} == {"dA", "dB"}


def test_a_layer_that_holds_its_weight_transposed_gives_it_as_the_others_do():
    model = get_peft_model(tiny_gpt2(), RoutedConfig(experts="goat", num_experts=2, r=2, target_modules=["c_fc"]))
    layer = routed_layers(model)[0]
    bank = layer.experts["default"]
    left, values, right = torch.linalg.svd(layer.base_layer.weight.T, full_matrices=False)
    expected = (left[:, :2] * values[:2]) @ right[:2] / (bank.scaling * 10)
    torch.testing.assert_close(bank.B0[0].T @ bank.A0[0], expected, atol=1e-5, rtol=1e-4)


def test_a_saved_adapter_brings_its_own_start(tmp_path):
    config, batch = RoutedConfig(experts="goat", num_experts=3, r=2, target_modules=["up_proj"]), padded_batch([5, 3])
    model = get_peft_model(tiny_llama(), config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_merges_under_constant_weights():
    assert_merges("goat")


def test_a_rank_above_the_weights_and_places_without_a_weight_are_refused():
    with pytest.raises(ValueError, match="r=40 must be at most 32"):
        get_peft_model(tiny_llama(), RoutedConfig(experts="goat", r=40, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="wraps='block' must be 'linear' with the kind 'goat'"):
        RoutedConfig(experts="goat", wraps="block")
