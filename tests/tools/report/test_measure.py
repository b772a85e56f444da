"""What a report counts is what the routers decided about tokens that are no padding, summed one by one."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import moe_peft
from moe_peft.tools.report.measure import measure_routing, tokens_of
from tests.contract.cases import METHODS, MODELS, randomize
from tests.tiny import padded_batch, tiny_llama

from .conftest import batches_of, routed_model


def one_by_one(model, batches, place):
    """(requests, mass, entropy, tokens) of each expert, in plain loops over rows, positions and slots."""
    requests, mass, entropy, tokens = [0.0] * 4, [0.0] * 4, 0.0, 0
    for batch in batches:
        with torch.no_grad(), moe_peft.telemetry.record(model) as routings:
            model(**batch)
        (routing,) = routings[place]
        for number, counts in enumerate(batch["attention_mask"].flatten().tolist()):
            if not counts:
                continue
            tokens += 1
            weights = [0.0] * 4
            for expert, weight in zip(routing.experts[number].tolist(), routing.weights[number].tolist(), strict=True):
                requests[expert] += 1
                weights[expert] += weight
            mass = [a + b for a, b in zip(mass, weights, strict=True)]
            shares = [w / sum(weights) for w in weights if w > 0]
            entropy -= sum(s * math.log(s) for s in shares) / math.log(4)
    return requests, mass, entropy, tokens


def test_sums_are_those_of_the_decisions_one_by_one_without_padding():
    model, batches = routed_model(), batches_of("law", "code")
    places = measure_routing(model, batches)
    assert len(places) == len(moe_peft.routed_layers(model))
    for own in (places[0], places[-1]):
        for group in batches:
            requests, mass, _, tokens = one_by_one(model, batches[group], own.place)
            found = own.statistics(group)
            assert found.requests.tolist() == requests and float(found.tokens) == tokens == 22
            assert found.mass.tolist() == pytest.approx(mass, abs=1e-5)
            half = own.statistics(group, 1)
            assert half.requests.tolist() == one_by_one(model, batches[group][1:], own.place)[0]
        both = [*batches["law"], *batches["code"]]
        requests, mass, entropy, tokens = one_by_one(model, both, own.place)
        assert own.total.load.tolist() == pytest.approx([value / sum(requests) for value in requests])
        assert own.token_entropy == pytest.approx(entropy / tokens, abs=1e-6)
        assert own.experts_per_token == 2 and own.decides == "router" and not own.dense


def test_more_padding_changes_nothing():
    model = routed_model()
    narrow, wide = padded_batch([5, 3], seed=1), padded_batch([5, 3], seed=1, width=11)
    a, b = (measure_routing(model, {"all": [batch]}) for batch in (narrow, wide))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one.total.mass, other.total.mass, atol=1e-5, rtol=1e-5)
        assert torch.equal(one.total.requests, other.total.requests)


@pytest.mark.parametrize("name", ["olmoe", "t5", "bert"])
def test_every_method_can_be_measured_on_every_kind_of_model(name):
    case = MODELS[name]
    methods = [method for method in METHODS if case.supports(method) and not method.endswith(("eager", "top2"))]
    for method in methods:
        config = case.config(method)
        model = get_peft_model(case.build(), config)
        randomize(model)
        batch = {k: v for k, v in case.batch().items() if k != "labels" or case.seq_to_seq}
        places = measure_routing(model, {"all": [batch]})
        for own in places:
            assert float(own.total.importance.sum()) == pytest.approx(1, abs=1e-5), (method, own.place)
            layer = next(layer for layer in moe_peft.routed_layers(model) if layer.place == own.place)
            follows = layer.router_of("default") is None
            assert own.follows_backbone == follows and (own.decides == "backbone") == follows
        if method in ("perft-d", "perft-s"):
            assert {own.decides for own in places} == {"nobody"}, method


def test_a_mixture_without_routed_adapters_is_measured_by_its_own_routers():
    base = MODELS["olmoe"].build()
    stock = get_peft_model(MODELS["olmoe"].build(), LoraConfig(target_modules=["q_proj"]))
    batch = padded_batch([6, 3], seed=3)
    with (
        torch.no_grad(),
        moe_peft.telemetry.record(
            followed := get_peft_model(MODELS["olmoe"].build(), moe_peft.ExpertLoraConfig(r=2)).eval()
        ) as routings,
    ):
        followed(**batch)
    for model in (base, stock):
        places = measure_routing(model, {"all": [batch]})
        expected = [moe_peft.telemetry.importance(own[0]) for own in routings.values()]
        assert [own.adapter for own in places] == ["backbone", "backbone"]
        for own, importance in zip(places, expected, strict=True):
            torch.testing.assert_close(own.total.importance.float(), importance)
        assert tokens_of(places, "all") == 9


def test_a_group_ends_after_enough_tokens():
    places = measure_routing(routed_model(), batches_of("law", "code"), max_tokens=10)
    assert [tokens_of(places, group) for group in ("law", "code")] == [10, 10]


def test_the_model_is_left_as_it_was():
    model = routed_model().train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    measure_routing(model, batches_of("law"))
    assert [module.training for module in model.modules()] == modes
    assert (
        not moe_peft.forward.find_trackers(model)[0].observers if hasattr(moe_peft.forward, "find_trackers") else True
    )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({}, "must be a dict"),
        ([{"input_ids": torch.ones(1, 2)}], "must be a dict"),
        ({"all": {"input_ids": torch.ones(1, 2)}}, "must be a dict"),
        ({"all": []}, "no decision to report"),
        ({"all": ["text"]}, "not a dict of tensors"),
    ],
)
def test_what_are_no_groups_of_batches_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        measure_routing(routed_model(), batches)


def test_a_model_in_which_nothing_routes_is_refused():
    with pytest.raises(ValueError, match="has no router to look at: it is dense"):
        measure_routing(tiny_llama(), batches_of("law"))
    model = routed_model()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="disabled or merged"):
        measure_routing(model, batches_of("law"))
