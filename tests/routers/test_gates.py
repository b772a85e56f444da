"""Gate functions."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import GATES
from moe_peft.types import TokenContext


@pytest.mark.parametrize("name", sorted(GATES))
def test_probabilities_are_not_negative_and_sum_to_one_where_a_gate_says_so(name):
    gate = GATES[name]()
    logits = 5 * torch.randn(50, 4, dtype=torch.float64)
    probs = gate(logits, TokenContext())
    assert probs.shape == logits.shape and (probs >= 0).all()
    if gate.sums_to_one:
        torch.testing.assert_close(probs.sum(-1), torch.ones(50, dtype=torch.float64))
        assert torch.equal(gate(logits[:, :1], TokenContext()), torch.ones(50, 1, dtype=torch.float64))
