"""Balancing by a bias: it selects and never weighs, follows the load after each step, and is saved, not trained."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, after_step, routed_layers
from moe_peft.routers import TopK
from moe_peft.routers.bias_balanced import BiasBalanced
from moe_peft.routers.sigmoid import Sigmoid
from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.tiny import padded_batch, tiny_llama

from .made import TRAINING, E, T, linear, rows


@pytest.mark.parametrize("normalise", [False, True])
def test_equals_the_formula(normalise):
    made, x = linear(BiasBalanced(top_k=2, norm_topk_prob=normalise), Sigmoid())
    made.bias.data = torch.tensor([0.9, -0.9, 0.1, 0.0]).double()
    expected, kept_by_p = [], 0
    for t in range(T):
        p = [torch.sigmoid((made.weight[e] * x[t]).sum()) for e in range(E)]
        kept = sorted(range(E), key=lambda e: -(p[e] + made.bias[e]).item())[:2]
        kept_by_p += set(kept) == set(sorted(range(E), key=lambda e: -p[e].item())[:2])
        total = sum(p[e] for e in kept) if normalise else 1.0
        expected.append([p[e] / total if e in kept else torch.zeros(()).double() for e in range(E)])
    assert kept_by_p < T  # the bias has changed the selection
    leaves = [x, made.weight]
    assert_same(made(x, TokenContext()).gate_matrix(), rows(expected), leaves, leaves)


def test_without_bias_it_is_top_k():
    made, x = linear(BiasBalanced(top_k=2))
    plain, _ = linear(TopK(top_k=2))
    found, expected = made(x, TRAINING), plain(x, TRAINING)
    assert torch.equal(found.experts, expected.experts) and torch.equal(found.weights, expected.weights)


def test_a_dropped_gate_is_not_selected_whatever_its_bias():
    made, x = linear(BiasBalanced(top_k=2, expert_dropout=0.6), expert_dropout=0.6)
    made.bias.data[0] = 10.0
    routing = made(x, TRAINING)
    assert ((routing.weights > 0) == (routing.experts < E)).all() and (routing.experts == E).any()


def test_after_a_step_experts_below_the_mean_load_gain_and_those_above_lose():
    made, x = linear(BiasBalanced(top_k=2, bias_rate=0.25))
    statistics = RoutingStatistics.of(made(x, TRAINING))
    made.after_step(statistics)
    expected = 0.25 * torch.sign(statistics.requests.mean() - statistics.requests)
    assert torch.equal(made.bias, expected) and not made.bias.requires_grad and expected.abs().sum() > 0
    made.after_step(RoutingStatistics.of(made(x[:0], TRAINING)))
    assert torch.equal(made.bias, expected)  # a step without tokens says nothing


def test_steps_even_out_the_load_and_leave_the_weights_alone():
    made, x = linear(BiasBalanced(top_k=1, bias_rate=0.02), num_tokens=256)
    before, weight = RoutingStatistics.of(made(x, TRAINING)).max_over_mean_load, made.weight.detach().clone()
    for _ in range(60):
        made.after_step(RoutingStatistics.of(made(x, TRAINING)))
    assert before > 1.3 and RoutingStatistics.of(made(x, TRAINING)).max_over_mean_load < 1.15
    assert torch.equal(made.weight, weight)


def test_a_models_biases_move_with_after_step_and_are_part_of_the_adapter(tmp_path):
    config = RoutedConfig(router="bias_balanced", num_experts=E, top_k=2, router_args={"bias_rate": 0.5})
    model, batch = get_peft_model(tiny_llama(), config).train(), padded_batch([5, 3])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    after_step(model)
    biases = [layer.router["default"].bias for layer in routed_layers(model)]
    assert all(bias.grad is None for bias in biases) and any((bias != 0).any() for bias in biases)
    assert sum(name.endswith("default.bias") for name in model.state_dict()) == len(biases)


def test_binary_weights_are_one_for_what_is_chosen():
    plain, x = linear(BiasBalanced(top_k=2))
    binary, _ = linear(BiasBalanced(top_k=2, binary=True))
    found, chosen = binary(x, TokenContext()), plain(x, TokenContext()).experts
    assert torch.equal(found.experts, chosen) and torch.equal(found.weights, torch.ones_like(found.weights))
