"""The base of expert kinds: what is missing is named, and a kind needs prepare and combine alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moe_peft.experts import EXPERTS, Experts, PendingRouting
from tests.compare import random_routing

SCALE = {"low_rank": {"scaling": 1.5}}


class Shifts(Experts):
    """Adds one vector per expert."""

    gives = frozenset({"activations"})

    def __init__(self, width, num_experts):
        super().__init__()
        self.num_choices = num_experts
        self.shift = nn.Parameter(torch.randn(num_experts, width).double())

    def prepare(self, x_TD, context):
        return x_TD

    def activations(self, h):
        return h[:, None].expand(-1, self.num_choices, -1)

    def combine(self, h, base_out_TO, routing, *, in_place=False):
        return base_out_TO + routing.gate_matrix() @ self.shift


def test_a_kind_needs_prepare_and_combine_alone():
    bank, x, routing = Shifts(5, 3), torch.randn(7, 5).double(), random_routing(7, 3, 2)
    expected = x + routing.gate_matrix() @ bank.shift
    assert torch.equal(bank(x, x, routing), expected)
    pending = PendingRouting(routing.context, lambda activations: routing if activations.shape == (7, 3, 5) else None)
    assert torch.equal(bank(x, x, pending), expected)
    assert bank.shared_rows(routing.context) is None and not bank.mergeable


def test_what_a_kind_lacks_is_named():
    bank, x = Experts(), torch.randn(2, 5)
    for call in (
        lambda: bank.prepare(x, None),
        lambda: bank.activations(x),
        lambda: bank.combine(x, x, None),
        lambda: bank.delta_weight(x),
        lambda: Experts.shapes(1, 1),
    ):
        with pytest.raises(NotImplementedError, match="Experts "):
            call()


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_parameters_are_flat_and_begin_as_a_kind_says(name):
    cls = EXPERTS[name]
    sizes = {"inner_features": 6} if name == "ffn_lora" else {}
    bank = cls(7, 5, num_experts=4, r=3, **sizes, **({"scaling": 1.0} if "scaling" in cls.fields else {}))
    begins = cls.shapes(4, 3)
    assert {key: tuple(p.shape[: len(begins[key])]) for key, p in bank.named_parameters()} == begins
    assert set(bank.up) <= set(begins) and all("." not in key for key in bank.state_dict())


@pytest.mark.parametrize("name", sorted(name for name, cls in EXPERTS.items() if cls.splits))
def test_a_kind_that_splits_computes_an_expert_from_its_rows_alone(name):
    bank = EXPERTS[name](7, 5, num_experts=4, r=3, init_weights=False, **SCALE.get(name, {})).double()
    x, base = torch.randn(6, 7).double(), torch.randn(6, 5).double()
    routing = random_routing(6, 4, 1)
    expected = bank(x, base, routing)
    for parameter in bank.parameters():
        assert parameter.shape[0] == 4
        parameter.data = parameter.data[2:]
    bank.hold(2)
    there = routing.experts[:, 0] >= 2
    local = replace(routing, experts=(routing.experts - 2).masked_fill(~there[:, None], 2), num_experts=2)
    local = replace(local, weights=routing.weights.masked_fill(~there[:, None], 0.0))
    torch.testing.assert_close(bank(x, base, local), torch.where(there[:, None], expected, base))


def test_a_promise_to_split_is_not_inherited():
    class Own(EXPERTS["low_rank"]):
        pass

    assert not Own(3, 3, num_experts=2, r=1, scaling=1.0).splits
    with pytest.raises(NotImplementedError, match="is not split over processes"):
        Experts().hold(1)
