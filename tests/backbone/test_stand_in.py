"""A stand-in is refused where copies of experts would not compute what the module computes; nothing changes then."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from moe_peft import EsftConfig
from moe_peft.backbone.stand_in import stand_in_fault
from moe_peft.backbone.structure import find_moe_layers
from tests.backbone.test_expert_tensors import experts_of
from tests.backbones.models import EXPERTS, FOLLOWED, NO_SLICES
from tests.contract.cases import tiny_olmoe

WIDTH = 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", [t for t in FOLLOWED if t not in NO_SLICES])
def test_the_experts_of_every_type_have_a_stand_in(model_type, dtype):
    experts = experts_of(model_type).to(dtype)
    width = 20 if model_type == "nemotron_h" else WIDTH
    assert stand_in_fault(experts, EXPERTS, width) is None
    assert stand_in_fault(experts.to("meta"), EXPERTS, width) is None


def another_call(cls):
    """Experts that are given no weights."""
    return {"forward": lambda self, hidden, index: hidden}


def numbers_of_their_own(cls):
    """Experts with a number each that is no parameter: copies have other indices."""

    def forward(self, hidden, index, weights):
        return cls.forward(self, hidden, index, weights * (1.0 + index))

    return {"forward": forward}


def a_count_by_another_name(cls):
    """Experts that are looked up by a number that says nothing of experts."""

    def forward(self, hidden, index, weights):
        return cls.forward(self, hidden, index, weights) * self.down_proj.unflatten(0, (self.size, -1)).shape[1]

    return {"forward": forward}


FAULTS = {
    another_call: "is not called with",
    numbers_of_their_own: "gives another output",
    a_count_by_another_name: "cannot be computed with copies",
}


@pytest.mark.parametrize("change", FAULTS)
def test_experts_whose_code_a_stand_in_does_not_repeat_are_refused_and_the_model_stays_as_it_was(change):
    model = tiny_olmoe()
    layers = find_moe_layers(model)
    experts = model.get_submodule(layers[-1].experts)
    experts.size = experts.num_experts
    experts.__class__ = type("Changed", (type(experts),), change(type(experts)))
    fault = stand_in_fault(experts, layers[-1].num_experts, WIDTH)
    assert fault is not None and FAULTS[change] in fault
    if change is another_call:  # no adapter finds them
        return
    before = copy.deepcopy([name for name, _ in model.named_modules()])
    with pytest.raises(ValueError, match=rf"(?s){layers[-1].experts}.*{FAULTS[change]}.*install the version of"):
        get_peft_model(model, EsftConfig(experts={"0": [0, 1], "1": [2]}))
    assert [name for name, _ in model.named_modules()] == before


def test_the_check_leaves_random_numbers_and_hooks_alone():
    experts = experts_of("qwen3_moe")
    experts.register_forward_hook(lambda *args: pytest.fail("a hook of the module ran"))
    state = torch.get_rng_state()
    assert stand_in_fault(experts, EXPERTS, WIDTH) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_packed_experts_are_asked_without_unpacking_them(monkeypatch):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    experts = experts_of("qwen3_moe")
    for name in ("gate_up_proj", "down_proj"):
        parametrize.replace_parameter_4bit(experts, name)
    monkeypatch.setattr(parametrize.Bnb4bitParametrization, "forward", lambda *args: pytest.fail("unpacked"))
    assert stand_in_fault(experts, EXPERTS, WIDTH) is None
