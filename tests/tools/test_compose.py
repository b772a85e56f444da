"""Composed LoRAs are each LoRA where the router chooses it alone, whatever their ranks, scales and places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import MoloraConfig, RoutedConfig, routed_layers
from moe_peft.routers import SCORERS, SELECTORS
from moe_peft.tools import compose, fit_centroids, fit_directions, train_router_alone
from moe_peft.tools.stock_lora import read_lora
from tests.tiny import padded_batch, tiny_llama, train
from tests.tools.exported import digest, logits, trained_lora

KINDS = (
    {},
    {"r": 2, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {"r": 6, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 1}},
)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return {f"expert{n}": str(trained_lora(folder / str(n), n, **own)) for n, own in enumerate(KINDS)}


def steered(model, expert):
    """Let every router send all tokens to one expert."""
    for layer in routed_layers(model):
        weight = next(layer.router["default"].parameters())
        with torch.no_grad():
            weight.fill_(-1e4)
            weight[expert] = 1e4


def test_routing_to_one_expert_alone_is_its_lora(loras):
    before = [digest(Path(folder)) for folder in loras.values()]
    config = RoutedConfig(router="dense", scorer="layer_logits", task_type="CAUSAL_LM")
    model = compose(tiny_llama(), loras, config)
    for expert, folder in enumerate(loras.values()):
        steered(model, expert)
        expected = logits(PeftModel.from_pretrained(tiny_llama(), folder))
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    assert [digest(Path(folder)) for folder in loras.values()] == before
    assert model.peft_config["default"].num_experts == 3 and model.peft_config["default"].r == 6


def test_one_lora_equals_it_and_is_saved_and_loaded(loras, tmp_path):
    folder = loras["expert0"]
    model = compose(tiny_llama(), {"own": folder})
    expected = logits(PeftModel.from_pretrained(tiny_llama(), folder))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("field", "name"), [*(("router", own) for own in SELECTORS), *(("scorer", own) for own in SCORERS)]
)
def test_any_router_of_the_registry_can_decide(field, name, loras):
    parts = {"router": SELECTORS, "scorer": SCORERS}[field]
    needs = parts[name].needs | parts[name].context_needs
    try:
        config = RoutedConfig(**{field: name}, task_type="CAUSAL_LM")
        model = compose(tiny_llama(), {own: loras[own] for own in ("expert0", "expert1")}, config)
    except ValueError as error:
        assert name in str(error) or needs, error  # what it needs is said
        return
    assert model.peft_config["default"].num_experts == 2
    pairs = [read_lora(loras[own]).pairs for own in ("expert0", "expert1")]
    for layer in routed_layers(model):
        bank = layer.experts["default"]
        for expert, own in enumerate(pairs):
            expected = own[layer.place].B @ own[layer.place].A if layer.place in own else torch.zeros(())
            found = bank.scaling * bank.B[expert].T @ bank.A[expert]
            torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=1e-6)


def test_the_router_alone_trains(loras):
    model = compose(tiny_llama(), loras, trained="router")
    model.set_adapter("default")
    experts = {name: own.clone() for name, own in model.named_parameters() if "routed_experts" in name}
    routers = {name: own.clone() for name, own in model.named_parameters() if "routed_router" in name}
    assert {name for name, own in model.named_parameters() if own.requires_grad} == set(routers)
    train(model, padded_batch([9, 6]), steps=2)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], own) for name, own in experts.items())
    assert all(not torch.equal(after[name], own) for name, own in routers.items())
    with pytest.raises(ValueError, match="No layer holds a router"):
        train_router_alone(model, "other")


def test_a_router_without_a_gradient_is_fitted_to_texts_or_to_the_experts(loras):
    config = RoutedConfig(scorer="centroid", router="top_k", top_k=1, task_type="CAUSAL_LM")
    model = compose(tiny_llama(), loras, config)
    texts = {expert: [padded_batch([9, 6], seed=expert)] for expert in range(3)}
    before = logits(model)
    fit_centroids(model, texts)
    assert not torch.equal(logits(model), before)
    alike = dict.fromkeys(("one", "two"), loras["expert0"])
    config = RoutedConfig(scorer="centroid", router="top_k", top_k=1, router_args={"sign_agnostic": True})
    model = compose(tiny_llama(), alike, config)
    fit_directions(model)
    for layer in routed_layers(model):
        rows = layer.router["default"].weight
        torch.testing.assert_close(rows[0].abs(), rows[1].abs())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RoutedConfig(r=2), "follows from the LoRAs"),
        (RoutedConfig(num_experts=5), "follows from the LoRAs"),
        (RoutedConfig(experts="bottleneck"), "no pairs of matrices"),
        (RoutedConfig(experts="shared_down"), "no pairs of matrices"),
        (RoutedConfig(wraps="block"), "no pairs of matrices"),
        (RoutedConfig(experts_args={"shared": 1}), "no pairs of matrices"),
        (MoloraConfig(), "must be a RoutedConfig"),
    ],
)
def test_configurations_that_contradict_the_loras_are_refused(config, message, loras):
    base = tiny_llama()
    with pytest.raises(ValueError, match=message):
        compose(base, loras, config)
    assert not hasattr(base, "peft_config")


def test_what_is_no_lora_of_the_model_is_refused_and_the_model_stays(loras):
    base = tiny_llama(hidden_size=64)
    with pytest.raises(ValueError, match="of another base model"):
        compose(base, loras)
    with pytest.raises(ValueError, match="no module of this model"):
        compose(tiny_llama(num_hidden_layers=1), loras)
    with pytest.raises(ValueError, match="has the model adapters"):
        compose(get_peft_model(tiny_llama(), MoloraConfig()).get_base_model(), loras)
    for adapters, trained, message in (
        ({}, "all", "must be a dict"),
        (list(loras), "all", "must be a dict"),
        (loras, "experts", "must be one of"),
        ({"own": "nowhere"}, "all", "no adapter of peft"),
    ):
        with pytest.raises(ValueError, match=message):
            compose(base, adapters, trained=trained)
    assert not hasattr(base, "peft_config")
