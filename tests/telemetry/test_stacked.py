"""Sums of many places in one pass are those of each place alone, whatever mixture of routers a model has."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, SiraConfig, telemetry
from moe_peft.forward.tracker import find_tracker
from moe_peft.telemetry import stacked
from moe_peft.telemetry.meter import RoutingMeter
from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.types import TokenContext
from tests.compare import random_routing
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama


def assert_equal(found: RoutingStatistics, expected: RoutingStatistics) -> None:
    for own in dataclasses.fields(RoutingStatistics):
        one, other = getattr(found, own.name), getattr(expected, own.name)
        assert (one is None) == (other is None), own.name
        if one is not None:
            torch.testing.assert_close(one, other, check_dtype=False)


@pytest.mark.parametrize("num_tokens", [1, 5, 13])
@pytest.mark.parametrize("top_k", [None, 1, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_sums_in_one_pass_are_those_of_each_routing(num_tokens, top_k, padded):
    valid = torch.arange(num_tokens) % 3 != 1 if padded else None
    made = []
    for place in range(3):
        routing = random_routing(num_tokens, 4, top_k, seed=place)
        dropped = None if top_k is None else torch.arange(routing.weights.numel()).view_as(routing.weights) % 2 == 0
        made.append(dataclasses.replace(routing, dropped=dropped, context=TokenContext(training=True, valid=valid)))
    found = stacked.stacked_statistics(made)
    for index, routing in enumerate(made):
        own = RoutingStatistics(*(part[index] for part in stacked.as_sums(found)))
        assert_equal(own, RoutingStatistics.of(routing))


def test_padding_that_is_not_finite_adds_nothing():
    routing = random_routing(4, 3, None)
    weights, probs = routing.weights.clone(), routing.probs.clone()
    weights[1] = probs[1] = float("nan")
    context = TokenContext(training=True, valid=torch.tensor([True, False, True, True]))
    found = stacked.stacked_statistics([dataclasses.replace(routing, weights=weights, probs=probs, context=context)])
    assert all(part.isfinite().all() for part in stacked.as_sums(found))


@pytest.mark.parametrize("limit", [1, 10**6])
def test_a_reading_does_not_depend_on_how_many_places_are_summed_at_a_time(limit, monkeypatch):
    monkeypatch.setattr(stacked, "MAX_ELEMENTS", limit)
    monkeypatch.setattr("moe_peft.telemetry.meter.MAX_WAITING", limit)
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=4, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("second", RoutedConfig(num_experts=3, router="dense", target_modules=["v_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    randomize(model)
    tracker, meter, expected = find_tracker(model.train()), RoutingMeter(), {}
    tracker.training_observers.append(meter.observe)

    def remember(place, adapter, routing):
        expected.setdefault((place, adapter), []).append(RoutingStatistics.of(routing))

    tracker.training_observers.append(remember)
    for lengths in ([6, 3], [4], [6, 3]):
        model(**padded_batch(lengths))
        meter.add_losses(tracker)
    reading = meter.read()
    assert reading.places.keys() == expected.keys() and len(expected) == 8
    for key, parts in expected.items():
        sums = zip(*(stacked.as_sums(part) for part in parts), strict=True)
        assert_equal(reading.places[key], RoutingStatistics(*(sum(own) for own in sums)))
    assert not meter.read().places


def test_batches_with_and_without_a_capacity_add_up():
    model = get_peft_model(tiny_llama(), SiraConfig(num_experts=4, top_k=2, capacity_factor=0.5, expert_dropout=0.0))
    randomize(model)
    routings = []
    for training in (True, False):
        with telemetry.record(model.train(training)) as made:
            model(**padded_batch([6, 3]))
        routings.append(next(iter(made.values()))[0])
    assert routings[0].dropped is not None and routings[1].dropped is None
    first, second = (stacked.as_sums(RoutingStatistics.of(routing)) for routing in routings)
    for one, other in ((first, second), (second, first)):
        added = RoutingStatistics(*stacked.add(one, other))
        torch.testing.assert_close(added.dropped, first[-1])
        torch.testing.assert_close(added.requests, first[0] + second[0])


def test_what_waits_holds_no_graph_and_is_bounded(monkeypatch):
    monkeypatch.setattr("moe_peft.telemetry.meter.MAX_WAITING", 40)
    meter = RoutingMeter()
    for step in range(20):
        routing = random_routing(4, 3, None, seed=step)
        context = TokenContext(training=True)
        graph = (routing.weights.clone().requires_grad_() * 1, routing.probs.clone().requires_grad_() * 1)
        meter.observe("place", "a", dataclasses.replace(routing, weights=graph[0], probs=graph[1], context=context))
        assert sum(waiting.probs.numel() for _, waiting in meter._waiting) <= 40
        assert not any(waiting.weights.requires_grad or waiting.logits.requires_grad for _, waiting in meter._waiting)
    assert meter.read().places["place", "a"].tokens == 80
