"""What every selector keeps: shapes, the context, and a constant weight for a single expert where it says so."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import SELECTORS
from moe_peft.types import TokenContext

VALUES = {"top_k": 2, "capacity_factor": 0.5}


def make(name, **values):
    cls = SELECTORS[name]
    return cls(**{key: value for key, value in {**VALUES, **values}.items() if key in cls.fields})


def decide(select, num_tokens, num_experts, context):
    """A decision about random scores, given what the selector asks for."""
    logits = torch.randn(num_tokens, num_experts + select.extra_scores)
    gated = logits if select.gates_extra else logits[:, :num_experts]
    return select(logits, gated.softmax(-1), context, num_experts, **select.tensors(num_experts))


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_a_decision_has_the_shapes_of_its_contract(name, num_tokens):
    context = TokenContext(training=True)
    routing = decide(make(name), num_tokens, 4, context)
    assert routing.gate_matrix().shape == routing.probs.shape == (num_tokens, 4) and routing.num_experts == 4
    assert routing.context is context and routing.logits.shape[0] == num_tokens
    slots = (num_tokens, 4) if routing.experts is None else routing.experts.shape
    assert routing.weights.shape == slots and make(name).num_slots in (None, slots[1])
    for extra in routing.extras.values():
        assert extra.shape[0] == num_tokens


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_single_expert_of_probability_one_has_one_weight_where_a_selector_says_so(name):
    select = make(name, top_k=1)
    if select.constant_for_one:
        gates = decide(select, 9, 1, TokenContext()).gate_matrix()
        assert torch.equal(gates, gates[:1].expand(9, 1))
