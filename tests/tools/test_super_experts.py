"""Experts with extreme outputs are found, and warned of before they are trained."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_peft
from moe_peft.tools import super_experts
from moe_peft.tools.super_experts import extreme
from tests.contract.cases import tiny_olmoe
from tests.tiny import padded_batch, tiny_llama

BATCHES = [padded_batch([6, 4]), padded_batch([7], seed=1)]


def slow_peaks(model, batches):
    """Largest output of each expert, token by token and expert by expert, from the weights."""
    peaks = {index: [0.0] * 4 for index in range(2)}
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        calls = []
        handle = experts.register_forward_pre_hook(
            lambda m, args, kwargs, calls=calls: calls.append(args), with_kwargs=True
        )
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        for hidden, chosen, _ in calls:
            for x, ids in zip(hidden, chosen.tolist(), strict=True):
                for e in ids:
                    gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
                    out = experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
                    peaks[index][e] = max(peaks[index][e], float(out.abs().max()))
    return peaks


@pytest.mark.parametrize("wrapped", [False, True])
def test_peaks_are_those_of_the_experts_alone_and_an_extreme_one_is_found(wrapped):
    model = tiny_olmoe().eval()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] *= 500
    expected = slow_peaks(model, BATCHES)
    if wrapped:
        model = get_peft_model(model, moe_peft.ExpertLoraConfig(task_type="CAUSAL_LM", r=2))
    found = super_experts(model, BATCHES, percentile=80)
    for layer, peaks in found.largest.items():
        assert peaks.tolist() == pytest.approx(expected[layer], rel=1e-4)
    assert found.experts == {1: [2]}
    with pytest.warns(moe_peft.MoePeftWarning, match=r"1 of the experts chosen for training .*\{1: \[2\]\}"):
        assert found.warn_of({"1": [0, 2]}) == {1: [2]}
    assert found.warn_of({"1": [0]}) == {} and found.among({0: [2]}) == {}


def test_both_conditions_must_hold():
    largest = {0: torch.tensor([1.0, 2.0, 50.0]), 1: torch.tensor([1.0, 100.0, 9.0])}
    assert extreme(largest, 50, 0.1) == {0: [2], 1: [1]}
    assert extreme(largest, 50, 0.6) == {1: [1]} and extreme(largest, 90, 0.1) == {1: [1]}


def test_what_has_no_experts_to_look_at_is_refused():
    with pytest.raises(ValueError, match="is a dense model"):
        super_experts(tiny_llama(), BATCHES)
    with pytest.raises(ValueError, match="there is no batch"):
        super_experts(tiny_olmoe(), [])
    for given in ({"percentile": 101}, {"share": -1}, {"share": True}):
        with pytest.raises(ValueError, match=next(iter(given))):
            super_experts(tiny_olmoe(), BATCHES, **given)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_told_instead_of_no_super_expert(value):
    model = tiny_olmoe()
    model.model.layers[1].mlp.experts.down_proj.data[:] = value
    with pytest.raises(ValueError, match=r"outputs of experts at model\.layers\.1\.mlp\.experts are not finite"):
        super_experts(model, BATCHES)
