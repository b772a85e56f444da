"""A part whose tensors a file would lose is refused before the model is changed; one that draws nothing is taken."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import RoutedConfig
from moe_peft.extend import EXPERTS, SCORERS, Experts, LowRankExperts, Place, Router, Softmax
from moe_peft.tuner.part_tensors import check_saved
from tests.tiny import OneLinear


class Scorer(Router):
    """z = W x with a weight that a subclass keeps in some way."""

    learns = True

    def __init__(self, in_features, num_experts, *, init_std=None, **settings):
        super().__init__(in_features, num_experts, **settings)
        self.keep(torch.randn(self.num_scores, in_features))

    def keep(self, weight):
        self.weight = nn.Parameter(weight)

    def scores(self, x, context):
        return x.float() @ self.weight.float().T


class InModules(Scorer):
    def keep(self, weight):
        self.net = nn.Sequential(nn.Linear(weight.shape[1], 4), nn.ReLU(), nn.Linear(4, weight.shape[0]))


class Unsaved(Scorer):
    def keep(self, weight):
        self.register_buffer("weight", weight, persistent=False)


class Attribute(Scorer):
    def keep(self, weight):
        self.weight = weight


class InDict(Scorer):
    def keep(self, weight):
        self.weight, self.kept = nn.Parameter(weight), {"noise": [weight.clone()]}


class OfGate(Scorer):
    def keep(self, weight):
        self.weight, self.gate = nn.Parameter(weight), Softmax()
        self.gate.noise = weight.clone()


class Counted(Scorer):
    """What is the same in every build may be kept in any way."""

    def keep(self, weight):
        self.weight, self.order = nn.Parameter(weight), torch.arange(weight.shape[0])
        self.register_buffer("unit", torch.ones(2), persistent=False)


class Bank(LowRankExperts):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fixed = torch.randn(3)


class OtherShapes(Bank):
    @classmethod
    def shapes(cls, num_experts, r):
        return {"A": (num_experts, r), "B": (r, num_experts)}


class NoShapes(Experts):
    def __init__(self, in_features, out_features, *, num_experts, r):
        super().__init__()
        self.num_choices = num_experts


REFUSED = {
    "in_modules": (InModules, r"InModules keeps \['net.0.weight', .*Make them parameters of the part itself"),
    "unsaved": (Unsaved, "Unsaved.weight is drawn when the part is built and not saved"),
    "attribute": (Attribute, r"self.weight = nn.Parameter\(..., requires_grad=False\)"),
    "in_dict": (InDict, "InDict.kept.noise.0 is drawn"),
    "of_gate": (OfGate, "OfGate.gate.noise is drawn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_whose_tensors_would_not_come_back_is_refused_and_the_model_stays(name, monkeypatch):
    cls, message = REFUSED[name]
    monkeypatch.setitem(SCORERS, name, cls)
    base = OneLinear(5, 3)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, RoutedConfig(scorer=name, target_modules=["linear"]))
    assert type(base.linear) is nn.Linear and not base._forward_hooks and not hasattr(base, "peft_config")


def test_a_bank_is_asked_as_a_router_is(monkeypatch):
    monkeypatch.setitem(EXPERTS, "bank", Bank)
    with pytest.raises(ValueError, match=r"Bank\.fixed is drawn"):
        get_peft_model(OneLinear(5, 3), RoutedConfig(experts="bank", target_modules=["linear"]))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            OtherShapes,
            ValueError,
            r"linear\.routed_experts\.B has the shape \(8, 4, 3\), where .* begins with \(4, 8\)",
        ),
        (NoShapes, NotImplementedError, "NoShapes does not say which tensors it saves"),
    ],
)
def test_a_bank_that_says_other_shapes_than_it_makes_is_refused_when_made_and_not_when_loaded(
    kind, error, message, monkeypatch
):
    monkeypatch.setattr(Bank, "__init__", LowRankExperts.__init__)
    monkeypatch.setitem(EXPERTS, "bank", kind)
    base = OneLinear(5, 3)
    with pytest.raises(error, match=message):
        get_peft_model(base, RoutedConfig(experts="bank", target_modules=["linear"]))
    assert type(base.linear) is nn.Linear and not hasattr(base, "peft_config")


def test_tensors_that_are_the_same_in_every_build_are_taken_and_looking_at_them_draws_no_random_numbers(monkeypatch):
    monkeypatch.setitem(SCORERS, "counted", Counted)
    config = RoutedConfig(scorer="counted", target_modules=["linear"])
    place, state = Place("linear", 5, 3), torch.random.get_rng_state()
    with torch.device("meta"):
        check_saved(config, place, config.build(place))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(get_peft_model(OneLinear(5, 3), config).base_model.model.linear.router["default"], Counted)
