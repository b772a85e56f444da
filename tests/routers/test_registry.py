"""Routers by name: a set of names means scorer, gate and selector, and what is registered is what is made."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import RoutedConfig
from moe_peft.part import Option
from moe_peft.routers import (
    GATES,
    ROUTERS,
    SCORERS,
    SELECTORS,
    LinearRouter,
    Softmax,
    TopK,
    make_router,
    router_fields,
    router_gives,
    router_learns,
    router_names,
    router_parts,
)
from moe_peft.types import TokenContext
from tests.tiny import tiny_llama

VALUES = {"top_k": 2, "norm_topk_prob": True, "capacity_factor": 0.5, "capacity_order": "position"}


class Biased(LinearRouter):
    """Scores with a bias of their own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = nn.Parameter(torch.zeros(self.num_scores))


class Named(TopK):
    """A selector whose tensor has the name of something of every router."""

    def tensors(self, num_experts):
        return {"gate": torch.zeros(num_experts)}


class Tempered(Softmax):
    options = (Option("tau", 1.0, "a positive number", lambda v: v > 0),)

    def __init__(self, *, tau):
        self.tau = tau

    def __call__(self, logits_TE, context):
        return super().__call__(logits_TE / self.tau, context)


@pytest.mark.parametrize("name", sorted(SELECTORS.keys() & ROUTERS.keys()))
@pytest.mark.parametrize("training", [False, True])
def test_a_whole_router_equals_its_selector_under_linear_scores_and_a_softmax(name, training):
    whole_cls = ROUTERS[name]
    torch.manual_seed(0)
    whole = whole_cls(7, 4, **{key: value for key, value in VALUES.items() if key in whole_cls.fields})
    torch.manual_seed(0)
    made = make_router(7, 4, router=name, values=VALUES)
    x, context = torch.randn(13, 7), TokenContext(training=training)
    found, expected = made(x, context), whole(x, context)
    assert torch.equal(found.gate_matrix(), expected.gate_matrix()) and torch.equal(found.probs, expected.probs)
    assert set(whole.state_dict()) == set(made.state_dict()) == {"weight"}
    assert router_fields(name) == set(whole_cls.fields)


def test_names_say_what_a_router_takes_gives_and_learns():
    assert set(router_names()) == {*ROUTERS, *SELECTORS}
    assert router_parts("top_k") == (LinearRouter, Softmax, TopK)
    assert "selection" in router_gives("top_k") and "selection" not in router_gives("dense")
    assert router_learns("dense") and not router_learns("constant")
    assert router_fields("constant") == {"routed_scaling_factor"}


def test_a_registered_gate_is_used_with_its_options(monkeypatch):
    monkeypatch.setitem(GATES, "tempered", Tempered)
    torch.manual_seed(0)
    router = make_router(7, 4, router="top_k", gate="tempered", values=VALUES, args={"tau": 0.5})
    x = torch.randn(5, 7)
    expected = (2 * (x @ router.weight.T)).softmax(-1)
    torch.testing.assert_close(router(x, TokenContext()).probs, expected)


def test_registries_hold_classes_that_say_what_they_take():
    for registry in (SCORERS, GATES, SELECTORS, ROUTERS):
        for part in registry.values():
            assert isinstance(part, type) and isinstance(part.fields, tuple)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_scorer_with_the_name_of_a_selectors_tensor_is_refused_when_it_is_built(monkeypatch, frozen):
    made = Biased if not frozen else type("Frozen", (Biased,), {"frozen": ("bias",)})
    monkeypatch.setitem(SCORERS, "biased", made)
    assert "bias" in dict(make_router(7, 4, router="top_k", scorer="biased", values=VALUES).named_parameters())
    with pytest.raises(ValueError, match=rf"scorer {made.__name__} and the selector BiasBalanced both have 'bias'"):
        make_router(7, 4, router="bias_balanced", scorer="biased", values=VALUES)
    base = tiny_llama()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="both have 'bias'"):
        get_peft_model(base, RoutedConfig(scorer="biased", router="bias_balanced", lora_alpha=8))
    assert [name for name, _ in base.named_modules()] == before


def test_a_selectors_tensor_with_the_name_of_what_every_router_has_is_refused(monkeypatch):
    monkeypatch.setitem(SELECTORS, "named", Named)
    with pytest.raises(ValueError, match="Named: a selector's tensor cannot be called 'gate'"):
        make_router(7, 4, router="named", values=VALUES)
