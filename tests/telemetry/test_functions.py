"""Statistics of routings at decisions whose values are known, and their collection from a model."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model

from moe_peft import LoraMoeConfig, RoutedConfig, SiraConfig, telemetry
from moe_peft.forward.tracker import find_tracker
from moe_peft.types import Routing, TokenContext
from tests.compare import random_routing
from tests.tiny import padded_batch, tiny_llama


def routing_of(gates, valid=None, dropped=None, top_k=None):
    gates = torch.tensor(gates)
    context = TokenContext(valid=None if valid is None else torch.tensor(valid))
    if top_k is None:
        return Routing(gates, None, gates, gates, context=context)
    weights, experts = gates.topk(top_k, -1)
    dropped = None if dropped is None else torch.tensor(dropped)
    return Routing(weights, experts, gates, gates, dropped, context)


def balanced():
    return routing_of(
        [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]], top_k=1
    )


def collapsed():
    return routing_of([[0.7, 0.1, 0.1, 0.1]] * 4, top_k=1)


def test_load_is_the_share_of_requests():
    routing = routing_of([[0.6, 0.3, 0.1], [0.6, 0.1, 0.3], [0.1, 0.8, 0.1]], top_k=2)
    # Requests: expert 0 three times (a tie goes to the first), expert 1 twice, expert 2 once.
    assert telemetry.load(routing).sum() == pytest.approx(1.0)
    assert telemetry.load(routing)[1].item() == pytest.approx(2 / 6)


def test_load_of_a_dense_decision_is_uniform():
    torch.testing.assert_close(telemetry.load(random_routing(5, 4)), torch.full((4,), 0.25, dtype=torch.float64))


def test_importance_is_the_share_of_the_gate_mass():
    routing = routing_of([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(telemetry.importance(routing), torch.tensor([0.75, 0.125, 0.125]))


def test_entropy_is_one_when_even_and_zero_when_collapsed():
    assert telemetry.load_entropy(balanced()).item() == pytest.approx(1.0, rel=1e-6)
    assert telemetry.load_entropy(collapsed()).item() == pytest.approx(0.0, abs=1e-6)
    assert telemetry.load_entropy(routing_of([[1.0]])).item() == 1.0
    half = routing_of([[0.5, 0.5, 0.0, 0.0]])
    assert telemetry.load_entropy(half).item() == pytest.approx(math.log(2) / math.log(4), rel=1e-6)


def test_max_over_mean_load_is_one_when_balanced_and_e_when_collapsed():
    assert telemetry.max_over_mean_load(balanced()).item() == pytest.approx(1.0)
    assert telemetry.max_over_mean_load(collapsed()).item() == pytest.approx(4.0)


def test_dead_experts_are_those_nobody_asked_for():
    assert telemetry.dead_experts(balanced()) == 0
    assert telemetry.dead_experts(collapsed()) == 3
    assert telemetry.dead_experts(random_routing(5, 4)) == 0


def test_drop_rate_is_the_share_of_requests_over_capacity():
    gates = [[0.6, 0.3, 0.1]] * 4
    dropped = [[False, False], [True, False], [True, True], [True, True]]
    routing = routing_of(gates, top_k=2, dropped=dropped)
    assert telemetry.drop_rate(routing).item() == pytest.approx(5 / 8)
    padded = routing_of(gates, valid=[True, True, True, False], top_k=2, dropped=dropped)
    assert telemetry.drop_rate(padded).item() == pytest.approx(3 / 6)
    assert telemetry.drop_rate(collapsed()) == 0


def test_confidence_is_the_mean_of_the_largest_probability():
    assert telemetry.confidence(routing_of([[0.6, 0.4], [0.1, 0.9]])).item() == pytest.approx(0.75)


STATISTICS = [
    telemetry.load,
    telemetry.importance,
    telemetry.load_entropy,
    telemetry.max_over_mean_load,
    telemetry.dead_experts,
    telemetry.drop_rate,
    telemetry.confidence,
]


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_every_statistic_is_blind_to_padding(statistic, top_k):
    plain = random_routing(13, 5, top_k)
    junk = random_routing(4, 5, top_k, seed=9)
    join = (lambda a, b: None) if top_k is None else (lambda a, b: torch.cat([a, b]))
    padded = Routing(
        torch.cat([plain.weights, junk.weights]),
        join(plain.experts, junk.experts),
        torch.cat([plain.logits, junk.logits]),
        torch.cat([plain.probs, junk.probs]),
        context=TokenContext(valid=torch.arange(17) < 13),
    )
    torch.testing.assert_close(statistic(padded), statistic(plain))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_every_statistic_of_no_token_is_finite(statistic, top_k):
    assert statistic(random_routing(0, 5, top_k)).isfinite().all()


def test_record_collects_one_decision_per_place_and_forward():
    model = get_peft_model(tiny_llama(), LoraMoeConfig(num_experts=3, target_modules=["up_proj"]))
    batch = padded_batch([4, 6])
    with telemetry.record(model) as routings, torch.no_grad():
        model.eval()(**batch)
        model.train()(**batch)
    assert list(routings) == [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    for made in routings.values():
        assert len(made) == 2
        assert all(routing.probs.shape == (12, 3) for routing in made)
        assert all(torch.equal(routing.valid, batch["attention_mask"].reshape(-1).bool()) for routing in made)


def test_record_stops_with_its_block_also_after_an_error():
    model = get_peft_model(tiny_llama(), LoraMoeConfig(num_experts=3, target_modules=["up_proj"]))
    with pytest.raises(KeyError), telemetry.record(model) as routings:
        raise KeyError
    model(**padded_batch([4, 6]))
    assert not routings and not find_tracker(model).observers


def test_record_changes_no_output():
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=3, target_modules=["up_proj"], init_weights=False))
    batch = padded_batch([4, 6])
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        with telemetry.record(model):
            assert torch.equal(model(**batch).logits, expected)


def test_record_of_a_training_forward_shows_dropped_requests():
    config = SiraConfig(num_experts=4, top_k=2, capacity_factor=0.5, expert_dropout=0.0, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(), config).train()
    with telemetry.record(model) as routings:
        model(**padded_batch([4, 12]))
    rates = [float(telemetry.drop_rate(made[0])) for made in routings.values()]
    assert all(0.3 < rate < 1.0 for rate in rates)


def test_record_needs_a_routed_adapter():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routed adapter"), telemetry.record(tiny_llama()):
        pass
