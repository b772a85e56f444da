"""A routing has settled as far as tokens keep the experts of the last checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model

import moe_peft
from moe_peft.tools import routing_saturation
from moe_peft.tools.saturation import expert_choices, overlap
from tests.tiny import padded_batch, tiny_llama

BATCHES = [padded_batch([6, 4]), padded_batch([5], seed=1)]


def routed(seed: int):
    torch.manual_seed(seed)
    return get_peft_model(tiny_llama(), moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4, top_k=2))


def test_overlap_counts_experts_of_a_token_whatever_their_order():
    first = torch.tensor([[0, 1], [2, 3], [0, 3]])
    assert overlap(first, torch.tensor([[1, 0], [2, 0], [1, 2]])) == pytest.approx((2 + 1 + 0) / 6)


def test_checkpoints_are_compared_with_the_last_and_with_the_one_before(tmp_path):
    choices = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = routed(0)
        for layer in moe_peft.routed_layers(model):
            torch.nn.init.normal_(layer.router["default"].weight, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(tmp_path / str(seed))
        choices.append(expert_choices(model.eval(), BATCHES, 2))
    own = routed(0).train()
    before = [p.requires_grad for p in own.parameters()]
    found = routing_saturation(own, [tmp_path / str(seed) for seed in range(3)], BATCHES, top_k=2)
    for place, last in choices[2].items():
        slow = []
        for made in choices:
            common = [len(set(a) & set(b)) / 2 for a, b in zip(made[place].tolist(), last.tolist(), strict=True)]
            slow.append(sum(common) / 15)
        assert found.saturation[place] == pytest.approx(slow) and slow[-1] == 1
        assert math.isnan(found.change_rate[place][0])
        assert found.change_rate[place][2] == pytest.approx(1 - slow[1])
    assert list(own.peft_config) == ["default"] and own.active_adapters == ["default"] and own.training
    assert [p.requires_grad for p in own.parameters()] == before


def test_what_cannot_be_compared_is_refused_and_leaves_the_adapters(tmp_path):
    model = routed(0)
    for given, message in (
        ((["a"], BATCHES), "two folders"),
        (("ab", BATCHES), "two folders"),
        ((["a", "b"], []), "batches is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            routing_saturation(model, *given)
    with pytest.raises(ValueError, match="top_k=0"):
        routing_saturation(model, ["a", "b"], BATCHES, top_k=0)
    with pytest.raises((ValueError, OSError)):
        routing_saturation(model, [tmp_path / "none", tmp_path / "none"], BATCHES)
    assert list(model.peft_config) == ["default"]
