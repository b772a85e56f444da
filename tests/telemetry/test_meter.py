"""Telemetry of training: what the meter reads is what the routings say, over all micro-batches and tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import get_peft_model

from moe_peft import LoraMoeConfig, RoutedConfig, SiraConfig, telemetry
from moe_peft.forward.objective import router_loss_values
from moe_peft.forward.tracker import find_tracker
from moe_peft.telemetry.meter import RoutingMeter, group_layers, metrics_of
from moe_peft.telemetry.stacked import add, as_sums
from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.types import TokenContext
from tests.compare import random_routing
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama, tiny_t5


def adapted(config, base=tiny_llama, **overrides):
    model = get_peft_model(base(**overrides), config)
    randomize(model)
    return model.train()


@pytest.mark.parametrize("top_k", [None, 2])
def test_statistics_of_added_sums_are_those_of_all_tokens(top_k):
    first, second = random_routing(5, 4, top_k), random_routing(8, 4, top_k)
    found = RoutingStatistics(*add(*(as_sums(RoutingStatistics.of(routing)) for routing in (first, second))))
    weights = torch.tensor([5 / 13, 8 / 13], dtype=torch.float64)
    mass = first.gate_matrix().sum(0) + second.gate_matrix().sum(0)
    torch.testing.assert_close(found.importance, mass / mass.sum())
    for name in ("load", "confidence"):
        parts = torch.stack([getattr(telemetry, name)(routing) for routing in (first, second)])
        torch.testing.assert_close(getattr(found, name), torch.tensordot(weights, parts, 1))
    assert found.dropped is None and found.drop_rate == 0


def test_a_capacity_adds_the_drop_rate():
    model = adapted(SiraConfig(num_experts=4, top_k=2, capacity_factor=0.5, expert_dropout=0.0))
    meter = RoutingMeter()
    find_tracker(model).training_observers.append(meter.observe)
    with telemetry.record(model) as routings:
        model(**padded_batch([6, 3]))
    reading = meter.read()
    for place, made in routings.items():
        expected = telemetry.drop_rate(made[0])
        torch.testing.assert_close(reading.places[place, "default"].drop_rate, expected)
    assert 0 < metrics_of(reading, 0)["moe/drop_rate"] < 1


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_reading_is_that_of_all_training_forwards_and_of_no_other(checkpointing):
    model = adapted(RoutedConfig(num_experts=4, router_z_loss_coef=0.1))
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    tracker, meter = find_tracker(model), RoutingMeter()
    tracker.training_observers.append(meter.observe)
    batches = [padded_batch([6, 3], seed=1), padded_batch([2, 5], seed=2)]
    made, losses = [], []
    for batch in batches:
        with telemetry.record(model) as routings:
            output = model(**batch, labels=batch["input_ids"])
        made.append({place: own[0] for place, own in routings.items()})
        losses.append(router_loss_values(model))
        meter.add_losses(tracker)
        output.loss.backward()
        model.zero_grad()
    with torch.no_grad():
        model(**batches[0])
    model.eval()(**batches[0])
    reading = meter.read()
    assert reading.places.keys() == {(place, "default") for place in made[0]}
    for (place, _), statistics in reading.places.items():
        expected = add(*(as_sums(RoutingStatistics.of(routings[place])) for routings in made))
        torch.testing.assert_close(as_sums(statistics), expected)
    for name, value in reading.losses.items():
        assert value == pytest.approx(sum(float(own[name]) for own in losses) / 2)
    assert not meter.read().places


def test_metrics_are_means_over_the_places_of_a_group():
    model = adapted(RoutedConfig(num_experts=4), num_hidden_layers=3)
    meter = RoutingMeter()
    find_tracker(model).training_observers.append(meter.observe)
    model(**padded_batch([6, 3]))
    reading = meter.read()
    metrics = metrics_of(reading, 2)
    entropies = {place: float(s.load_entropy) for (place, _), s in reading.places.items()}
    for key, layers in (("layers_0-1", (0, 1)), ("layers_2-2", (2,))):
        own = [e for place, e in entropies.items() if any(f"layers.{layer}." in place for layer in layers)]
        assert metrics[f"moe/{key}/load_entropy"] == pytest.approx(sum(own) / len(own))
    assert metrics["moe/load_entropy"] == pytest.approx(sum(entropies.values()) / len(entropies))
    assert not any("drop_rate" in name for name in metrics)


def test_places_with_a_capacity_and_without_are_added_up_and_read_together():
    def routing(num_tokens, num_experts, dropped):
        made = random_routing(num_tokens, num_experts, 2, context=TokenContext(training=True))
        if not dropped:
            return made
        return dataclasses.replace(made, dropped=torch.rand(num_tokens, 2) < 0.5)

    meter, shapes = RoutingMeter(), {"layers.0.a": 4, "layers.1.a": 4, "layers.1.b": 6}
    expected = {}
    for num_tokens, with_capacity in ((7, ("layers.0.a",)), (5, ("layers.0.a", "layers.1.b")), (9, ())):
        for place, num_experts in shapes.items():
            own = routing(num_tokens, num_experts, place in with_capacity)
            meter.observe(place, "default", own)
            sums = as_sums(RoutingStatistics.of(own))
            expected[place] = add(expected[place], sums) if place in expected else sums
    reading = meter.read()
    for (place, _), statistics in reading.places.items():
        torch.testing.assert_close(as_sums(statistics), expected[place])
    found = metrics_of(reading, 0)
    own = {place: RoutingStatistics(*sums) for place, sums in expected.items()}
    for name in ("load_entropy", "max_over_mean_load", "dead_experts", "confidence"):
        values = [float(getattr(statistics, name)) for statistics in own.values()]
        assert found[f"moe/{name}"] == pytest.approx(sum(values) / len(values))
    rates = [float(s.drop_rate) for s in own.values() if s.dropped is not None]
    assert len(rates) == 2 and found["moe/drop_rate"] == pytest.approx(sum(rates) / 2)


def test_layers_of_several_stacks_are_named_by_the_stack():
    model = adapted(LoraMoeConfig(num_experts=3), base=tiny_t5)
    places = [layer.place for layer in model.modules() if hasattr(layer, "place")]
    groups = group_layers(places, 1)
    assert set(groups) == {"encoder_block_0-1", "decoder_block_0-1"}
    assert set().union(*groups.values()) == set(places)
    assert group_layers(["model.layers.3.mlp.up_proj", "head"], 4) == {"layers_3-3": {"model.layers.3.mlp.up_proj"}}
    assert group_layers(places, 0) == {}
