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


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_a_decision_has_the_shapes_of_its_contract(name, num_tokens):
    logits, context = torch.randn(num_tokens, 4), TokenContext(training=True)
    routing = make(name)(logits, logits.softmax(-1), context, 4)
    assert routing.gate_matrix().shape == routing.probs.shape == (num_tokens, 4) and routing.num_experts == 4
    assert (
        routing.context is context
        and routing.weights.shape == (routing.experts if routing.experts is not None else logits).shape
    )
    assert (routing.experts is not None) == ("selection" in make(name).gives)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_single_expert_of_probability_one_has_one_weight_where_a_selector_says_so(name):
    select = make(name, top_k=1)
    if select.constant_for_one:
        logits = torch.randn(9, 1)
        gates = select(logits, torch.ones(9, 1), TokenContext(), 1).gate_matrix()
        assert torch.equal(gates, gates[:1].expand(9, 1))
