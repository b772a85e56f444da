"""SparseMixer for any number of experts: transformers' own for one and two on shared noise, a loop for more."""

from __future__ import annotations

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moe_peft.routers.sparsemixer import SparseMixer
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import TRAINING, E, T, linear

EPS = 0.3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_equals_that_of_transformers_on_shared_noise(top_k, training):
    router, x = linear(SparseMixer(top_k=top_k, jitter_eps=EPS))
    torch.manual_seed(3)
    routing = router(x, TRAINING if training else TokenContext())
    torch.manual_seed(3)
    weights, experts = sparsemixer(x @ router.weight.T, EPS, training, 2)
    assert torch.equal(routing.experts, experts[:, :top_k])
    # Its third is rounded to four digits.
    leaves = [x, router.weight]
    assert_same(routing.weights, weights[:, :top_k], leaves, leaves, tolerance=2e-4)


@pytest.mark.parametrize("top_k", [1, 3, E])
def test_evaluation_takes_the_largest_one_after_the_other(top_k):
    router, x = linear(SparseMixer(top_k=top_k, jitter_eps=EPS))
    z, rows = x @ router.weight.T, []
    for t in range(T):
        left, row = list(range(E)), []
        for _ in range(top_k):
            best = max(left, key=lambda e: z[t, e].item())
            near = [e for e in left if (z[t, best] - z[t, e]) / max(abs(z[t, e]), z[t, best]) <= 2 * EPS]
            row.append(torch.stack([z[t, e] for e in near]).softmax(0)[near.index(best)])
            left.remove(best)
        rows.append(torch.stack(row))
    routing = router(x, TokenContext())
    assert torch.equal(routing.experts, z.topk(top_k).indices)
    assert_same(routing.weights, torch.stack(rows), [x, router.weight], [x, router.weight])


def test_training_draws_distinct_experts_by_their_probability():
    select = SparseMixer(top_k=3, jitter_eps=1.0)
    z = torch.tensor([1.0, 0.5, 0.2, 0.1]).double().expand(4000, E)
    torch.manual_seed(0)
    drawn = select(z, z.softmax(-1), TRAINING, E).experts
    assert all(len({*row}) == 3 for row in drawn[:50].tolist())
    shares = torch.bincount(drawn[:, 0], minlength=E) / len(drawn)
    torch.testing.assert_close(shares.double(), z[0].softmax(-1), atol=0.03, rtol=0)


def test_a_dropped_gate_has_no_weight():
    router, x = linear(SparseMixer(top_k=2, expert_dropout=0.5), expert_dropout=0.5)
    routing = router(x, TRAINING)
    dropped = routing.experts == E
    assert dropped.any() and not routing.weights[dropped].any() and routing.weights[~dropped].all()
