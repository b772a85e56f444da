"""The losses of a pass: no work at the places, calls found again, nothing kept between steps."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig
from moe_peft.forward import measurement
from moe_peft.forward.joined_losses import LayerLosses
from moe_peft.forward.measurement import Measurement
from moe_peft.forward.pass_losses import repeated_call
from moe_peft.forward.tracker import find_tracker
from moe_peft.losses import LOSSES
from tests.compare import random_routing
from tests.tiny import padded_batch, tiny_llama

SHARED = {"num_experts": 4, "r": 2, "init_weights": False, "lora_dropout": 0.0}


def adapted(**fields):
    config = RoutedConfig(target_modules=["up_proj", "down_proj"], losses={"z_loss": 0.1}, **SHARED, **fields)
    return get_peft_model(tiny_llama(), config).train()


def test_all_places_of_a_pass_are_measured_in_one_stack(monkeypatch):
    sizes = []
    own = measurement.Places

    def places(routings, *, apart):
        sizes.append(len(routings))
        return own(routings, apart=apart)

    monkeypatch.setattr(measurement, "Places", places)
    model = adapted()
    model(**padded_batch([5, 3])).logits.sum().backward()
    assert sizes == [4]


def call_of(routing):
    return Measurement(LayerLosses({"z_loss": LOSSES["z_loss"]()}, {"z_loss": 1.0}, "micro_batch"), routing)


def test_a_repeated_call_is_told_by_its_decision_also_where_lengths_differ():
    routings = [random_routing(tokens, 4, 2) for tokens in (5, 7, 5)]
    routings[2] = replace(routings[2], weights=routings[2].weights.flip(0))
    made = [call_of(routing) for routing in routings]
    for call in made:
        call.weights = call.routing.weights.detach()
    for call, routing in zip(made, routings, strict=True):
        assert repeated_call(made, call_of(routing)) is call
    assert repeated_call(made[:1], call_of(routings[2])) is made[0]


def test_a_call_that_no_pass_knows_is_measured_alone():
    call = call_of(random_routing(5, 4, 2))
    assert repeated_call([], call) is call and set(call.gradients) == {"logits"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_decision_or_gradient_outlives_the_backward_pass(checkpointing):
    model = adapted()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**padded_batch([5, 3]), use_cache=False).logits.sum()
    layers = [made[0] for made in find_tracker(model).latest.layers.values()]
    assert len(layers) == 4 and all(layer.joined for layer in layers)
    nodes, reached, calls_seen = [loss.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is not None and node not in reached:
            reached.add(node)
            calls_seen += [weakref.ref(node.measured)] if hasattr(node, "measured") else []
            nodes += [parent for parent, _ in node.next_functions]
    assert len(calls_seen) == 4 and all(call().gradients for call in calls_seen)
    loss.backward()
    del loss, node, nodes, reached
    assert all(call() is None for call in calls_seen)


def test_a_backward_pass_before_the_forward_has_ended_is_refused():
    class Early(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, inputs_embeds):
            self.linear(inputs_embeds).sum().backward()
            return inputs_embeds

    model = get_peft_model(Early(), RoutedConfig(target_modules=["linear"], **SHARED)).train()
    with pytest.raises(RuntimeError, match="before the forward of its model had ended"):
        model(inputs_embeds=torch.randn(1, 3, 4))
