"""Experts that are off get no weight and others take their places; experts that are on are among the best."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_peft
from moe_peft import telemetry
from moe_peft.backbone.experts_call import ExpertsCall
from moe_peft.tools import expert_mask
from moe_peft.tools.expert_mask import steered_call
from tests.contract.cases import METHODS, MODELS, randomize, tiny_olmoe
from tests.tiny import padded_batch, tiny_llama

BATCH = padded_batch([6, 4])


def routed(**fields):
    config = moe_peft.RoutedConfig(
        task_type="CAUSAL_LM", num_experts=4, **{"top_k": 2, "init_weights": False, **fields}
    )
    return get_peft_model(tiny_llama(), config).eval()


def routings(model):
    with torch.no_grad(), telemetry.record(model) as found:
        logits = model(**BATCH).logits
    return logits, {place: own[0] for place, own in found.items()}


def test_other_experts_take_the_places_of_those_that_are_off():
    model = routed()
    plain, before = routings(model)
    with expert_mask(model, off=[0, 3]):
        steered, after = routings(model)
    assert not torch.equal(plain, steered)
    place = "model.layers.0.mlp.up_proj"
    first = next(own for own in before if own.startswith("model.layers.0"))
    for name, routing in after.items():
        assert {1, 2} == set(routing.experts.flatten().tolist()), name
        assert bool((routing.gate_matrix()[:, [0, 3]] == 0).all()) and bool((routing.weights > 0).all())
    # The softmax of the scores that are left, at a place whose input is that of the plain forward.
    left = before[first].logits[:, [1, 2]].softmax(-1)
    torch.testing.assert_close(after[first].gate_matrix()[:, [1, 2]], left)
    assert place in after
    again, _ = routings(model)
    assert torch.equal(plain, again)


def test_forced_experts_are_used_by_every_token_and_masks_nest():
    model = routed()
    with expert_mask(model, on={0: [3]}):
        _, after = routings(model)
        with expert_mask(model, off={0: [0]}):
            _, both = routings(model)
    for name, routing in after.items():
        used = (routing.experts == 3).any(-1)
        assert bool(used.all()) == name.startswith("model.layers.0") or bool(used.all())
        if name.startswith("model.layers.0"):
            assert bool(used.all()) and bool((routing.gate_matrix()[:, 3] == routing.weights.amax(-1)).all())
    first = {name: own for name, own in both.items() if name.startswith("model.layers.0")}
    assert all(bool((own.experts == 3).any(-1).all()) and not bool((own.experts == 0).any()) for own in first.values())


@pytest.mark.parametrize("method", ["molora", "mov", "perft-d", "perft-r", "loramoe", "sira"])
def test_experts_that_are_off_add_nothing_whatever_the_router(method):
    """The output is that of experts whose tensors are zero, or equal to what stands for nothing."""
    case = MODELS["llama"]
    model = get_peft_model(case.build(), case.config(method)).eval()
    randomize(model)
    with expert_mask(model, off=[1]):
        steered, after = routings(model)
    assert all(bool((own.gate_matrix()[:, 1] == 0).all()) for own in after.values())
    with torch.no_grad():
        for layer in moe_peft.routed_layers(model):
            bank = layer.experts["default"]
            if hasattr(bank, "B"):
                bank.B[1] = float("nan")
                bank.A[1] = 0
                bank.B[1] = 1e3 * torch.randn_like(bank.B[1])
            else:
                bank.vectors[1] = 77.0
    with expert_mask(model, off=[1]):
        changed, _ = routings(model)
    torch.testing.assert_close(changed, steered)


@pytest.mark.parametrize("method", [None, "perft-e", "expert-lora", "esft"])
def test_the_backbones_routing_is_steered_under_every_adapter_that_follows_it(method):
    model = tiny_olmoe().eval()
    if method is not None:
        model = get_peft_model(model, METHODS[method](task_type="CAUSAL_LM")).eval()
        randomize(model)
    with torch.no_grad():
        plain = model(**BATCH).logits
        with expert_mask(model, off=[2], on={1: [0]}, backbone=True):
            steered = model(**BATCH).logits
        assert not torch.equal(plain, steered) and torch.equal(model(**BATCH).logits, plain)
        if method is not None:
            with expert_mask(model, off=[2], backbone=True):
                _, after = routings(model)
            assert all(bool((own.gate_matrix()[:, 2] == 0).all()) for own in after.values())


def test_a_steered_call_keeps_the_sum_of_the_weights():
    index = torch.tensor([[0, 1], [2, 3], [1, 3]])
    weights = torch.tensor([[0.6, 0.2], [0.5, 0.1], [0.3, 0.4]])
    call = ExpertsCall(torch.zeros(3, 2), index, weights)
    off = steered_call(call, [1], [], 4)
    torch.testing.assert_close(off.weights, torch.tensor([[0.8, 0.0], [0.5, 0.1], [0.0, 0.7]]))
    on = steered_call(call, [], [0], 4)
    assert on.index.tolist() == [[0, 1], [2, 0], [0, 3]]
    torch.testing.assert_close(on.weights, torch.tensor([[0.6, 0.2], [0.3, 0.3], [0.35, 0.35]]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither `off` nor `on`"),
        ({"off": [4]}, "experts from 0 to 3"),
        ({"off": [True]}, "experts from 0 to 3"),
        ({"off": [1], "on": [1]}, "both off and on"),
        ({"off": [0, 1, 2, 3]}, "every expert of"),
        ({"off": {7: [1]}}, "names 7, which is no layer"),
        ({"off": {"nowhere": [1]}}, "names 'nowhere'"),
        ({"off": "1"}, "must be a list of experts"),
        ({"off": [1], "adapter_name": "law"}, "no adapter 'law'"),
        ({"off": [1], "backbone": True}, "has no experts of its own"),
    ],
)
def test_what_cannot_be_steered_is_refused_and_leaves_no_hook(given, message):
    model = routed()
    with pytest.raises(ValueError, match=message), expert_mask(model, **given):
        pass
    assert not any(
        module._forward_hooks for layer in moe_peft.routed_layers(model) for module in layer.router.values()
    )


def test_no_expert_is_forced_where_nothing_is_decided_by_scores():
    case = MODELS["llama"]
    model = get_peft_model(case.build(), case.config("perft-d"))
    with pytest.raises(ValueError, match="does not decide by scores"), expert_mask(model, on=[1]):
        pass
