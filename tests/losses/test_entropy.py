"""Entropies in nats, of Shannon and Tsallis, with finite gradients where a probability is zero."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft.losses.entropy import entropy, largest_entropy
from tests.compare import assert_same


@pytest.mark.parametrize("index", [1.0, 0.5, 1.1, 2.0])
def test_equals_the_formula_and_is_largest_for_even_probabilities(index):
    probs = torch.randn(9, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    if index == 1:
        expected = torch.stack([-sum(p * p.log() for p in row) for row in probs])
    else:
        expected = torch.stack([(1 - sum(p**index for p in row)) / (index - 1) for row in probs])
    assert_same(entropy(probs, index), expected, [probs], [probs])
    even = torch.full((5,), 0.2, dtype=torch.float64)
    assert entropy(even, index).item() == pytest.approx(largest_entropy(5, index), rel=1e-12)
    assert entropy(probs, index).max() < largest_entropy(5, index)


def test_tsallis_tends_to_shannon():
    probs = torch.randn(9, 5, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(entropy(probs, 1 + 1e-7), entropy(probs), rtol=1e-5, atol=0)
    assert largest_entropy(8) == pytest.approx(math.log(8))


@pytest.mark.parametrize("index", [1.0, 1.1])
def test_a_probability_of_zero_gives_no_nan(index):
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    entropy(torch.nn.functional.dropout(logits.softmax(-1), 0.5), index).sum().backward()
    assert torch.isfinite(logits.grad).all()
