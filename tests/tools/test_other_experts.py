"""Experts are taken over by number, with the router's numbers for them; whatever counts experts follows."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import EsftConfig, MoloraConfig, MovConfig, PerftConfig, RoutedConfig, routed_layers
from moe_peft.tools.other_experts import NEW, routed_by_name, with_experts
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import tiny_llama
from tests.tools.exported import BATCH, logits

KINDS = {
    "dense": (tiny_llama, MoloraConfig(num_experts=4, r=2)),
    "vectors": (tiny_llama, MovConfig(num_experts=4)),
    "blocks": (tiny_olmoe, PerftConfig(variant="R", num_experts=4, r=2, top_k=2)),
    "shared expert": (tiny_llama, RoutedConfig(num_experts=4, r=2, experts_args={"shared": 1})),
    "null experts": (tiny_llama, RoutedConfig(num_experts=4, r=2, router="null_top_k")),
    "task table": (tiny_llama, RoutedConfig(num_experts=4, r=2, scorer="task_table", router_args={"num_tasks": 4})),
    "latent cores": (tiny_llama, RoutedConfig(num_experts=4, r=2, experts="latent_core")),
    "followers": (tiny_llama, RoutedConfig(num_experts=4, r=2, router_scope="block")),
    "whole FFNs": (tiny_llama, RoutedConfig(num_experts=4, r=2, experts="ffn_lora", wraps="block")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_in_another_order_are_the_same_adapter(kind):
    build, config = KINDS[kind]
    model = get_peft_model(build().double(), config).double().eval()
    randomize(model)
    batch = {**BATCH, "task_type": torch.tensor([3, 1])} if kind == "task table" else BATCH
    with torch.no_grad():
        expected = model(**batch).logits
        layers = routed_by_name(model, "default")
        with_experts(model, "default", "turned", {name: [2, 0, 3, 1] for name in layers})
        assert model.active_adapters == ["turned"]
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)
        model.set_adapter("default")
        assert torch.equal(model(**batch).logits, expected)


def test_new_experts_start_as_in_training_and_the_others_keep_their_numbers():
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=3, r=2, experts_args={"shared": 1}))
    randomize(model)
    with_experts(model, "default", "more", {name: [1, NEW, 0, 2] for name in routed_by_name(model, "default")})
    for layer in routed_layers(model):
        old, new = layer.experts["default"], layer.experts["more"]
        assert torch.equal(new.B[[0, 2, 3, 4]], old.B[[1, 0, 2, 3]]) and not new.B[1].any()
        rows = layer.router["more"].weight, layer.router["default"].weight
        assert torch.equal(rows[0][[0, 2, 3]], rows[1][[1, 0, 2]])


@pytest.mark.parametrize(
    ("build", "config", "new_name", "experts", "message"),
    [
        (tiny_olmoe, EsftConfig(experts={"1": [1]}), "new", [0], "not counted by num_experts"),
        (tiny_llama, RoutedConfig(per_layer={"num_experts": [2, 3]}), "new", [0], "not counted by num_experts"),
        (tiny_llama, MoloraConfig(num_experts=2), "default", [0], "already"),
        (tiny_llama, MoloraConfig(num_experts=2), "new", [], "same number"),
        (tiny_llama, RoutedConfig(scorer="token_mask", num_experts=2), "new", [0], "TokenMask is depends on all"),
    ],
)
def test_what_has_no_other_number_of_experts_is_refused(build, config, new_name, experts, message):
    model = get_peft_model(build(), config)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        with_experts(model, "default", new_name, dict.fromkeys(routed_by_name(model, "default"), experts))
    with pytest.raises(ValueError, match="No layer holds"):
        with_experts(model, "other", "new", {})
    assert list(model.state_dict()) == names
    assert logits(model).isfinite().all()
