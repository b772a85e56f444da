"""Divergence, evenness and experts in effect are those of their definitions, in plain sums."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft.tools.report.measures import (
    divergence,
    effective_experts,
    known_mean,
    pair_divergences,
    relative_entropy,
)


def kullback_leibler(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_a_divergence_is_the_mean_distance_to_the_mean_in_bits():
    rows = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.0, 0.5, 0.5]]
    found, slow = pair_divergences(torch.tensor(rows)), []
    for i, p in enumerate(rows):
        for j, q in enumerate(rows):
            m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            expected = (kullback_leibler(p, m) + kullback_leibler(q, m)) / 2 / math.log(2)
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)
            slow += [expected] if i < j else []
    assert divergence(torch.tensor(rows)) == pytest.approx(sum(slow) / 3, abs=1e-6)


def test_divergence_is_zero_for_equal_groups_and_one_for_groups_that_share_nothing():
    assert divergence(torch.tensor([[0.3, 0.7]] * 3)) == 0
    assert divergence(torch.eye(4)) == pytest.approx(1)
    assert math.isnan(divergence(torch.ones(1, 1)))


def test_experts_in_effect_and_evenness():
    assert effective_experts(torch.full((8,), 1 / 8)) == pytest.approx(8)
    assert effective_experts(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    assert effective_experts(torch.zeros(3)) == 0
    assert relative_entropy(torch.tensor([0.5, 0.5, 0, 0])) == pytest.approx(0.5)
    assert relative_entropy(torch.ones(1)) == 1


def test_the_mean_leaves_out_what_is_not_known():
    assert known_mean([1.0, math.nan, 2.0]) == 1.5 and math.isnan(known_mean([math.nan]))
