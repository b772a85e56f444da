"""Uncertain tokens use all experts: in training or always, the first ones of a sequence where they are limited."""

from __future__ import annotations

import math

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.routers import TopK
from moe_peft.routers.entropy_top_k import EntropyTopK
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import TRAINING, E, T, linear, rows


def entropy_of(p, q):
    return -sum(v * v.log() for v in p) if q == 1 else (1 - sum(v**q for v in p)) / (q - 1)


@pytest.mark.parametrize("q", [1.0, 1.1, 2.0])
@pytest.mark.parametrize("share", [None, 0.75])
@pytest.mark.parametrize("normalise", [False, True])
def test_equals_the_formula(q, share, normalise):
    least = {1.0: 1.0, 1.1: 0.95, 2.0: 0.55}[q]
    settings = {"entropy_index": q, "entropy_threshold": least, "broadcast": "always", "p": share}
    made, x = linear(EntropyTopK(top_k=2, norm_topk_prob=normalise, **settings))
    expected, uncertain = [], 0
    for t in range(T):
        p = torch.stack([(made.weight[e] * x[t]).sum() for e in range(E)]).softmax(-1)
        order = sorted(range(E), key=lambda e: -p[e].item())
        if entropy_of(p, q) >= least:
            expected.append(list(p))
            uncertain += 1
            continue
        kept = [e for n, e in enumerate(order) if n < 2 or (share and sum(p[o].item() for o in order[:n]) < share)]
        total = sum(p[e] for e in kept) if normalise else 1.0
        expected.append([p[e] / total if e in kept else torch.zeros(()).double() for e in range(E)])
    assert 0 < uncertain < T
    assert_same(made(x, TokenContext()).gate_matrix(), rows(expected), [x, made.weight], [x, made.weight])


def test_a_threshold_that_nothing_reaches_is_top_k():
    made, x = linear(EntropyTopK(top_k=2, entropy_threshold=math.inf, broadcast="always"))
    plain, _ = linear(TopK(top_k=2))
    assert torch.equal(made(x, TRAINING).gate_matrix(), plain(x, TRAINING).gate_matrix())


def test_broadcasting_in_training_leaves_evaluation_alone():
    made, x = linear(EntropyTopK(top_k=2, entropy_threshold=0.0))
    plain, _ = linear(TopK(top_k=2))
    assert torch.equal(made(x, TokenContext()).gate_matrix(), plain(x, TokenContext()).gate_matrix())
    assert torch.equal(made(x, TRAINING).gate_matrix(), made(x, TRAINING).probs)
    made.perturbs_training = False
    assert torch.equal(made(x, TRAINING).gate_matrix(), plain(x, TRAINING).gate_matrix())


def test_only_the_first_uncertain_tokens_of_a_sequence_are_broadcast_and_padding_takes_no_place():
    made, x = linear(EntropyTopK(top_k=1, entropy_threshold=0.0, max_slots=2), num_tokens=8)
    valid = torch.tensor([True, False, True, True, False, True, True, True])
    context = TokenContext(True, valid, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 2)
    counts = made(x, context).request_matrix().sum(-1).tolist()
    assert counts == [4, 0, 4, 1, 0, 4, 4, 1]
    with pytest.raises(ValueError, match="max_slots=2: the backbone runs the module in slices of the rows"):
        made(x, TokenContext(training=True, part=4))


def test_even_probabilities_are_uncertain_where_no_threshold_is_given():
    probs = torch.tensor([[0.25] * 4, [0.4, 0.3, 0.2, 0.1]]).double()
    routing = EntropyTopK(top_k=1, broadcast="always")(probs.log(), probs, TokenContext(), 4)
    assert routing.request_matrix().sum(-1).tolist() == [4, 1]


def test_places_and_always_do_not_go_together():
    with pytest.raises(ValueError, match="router_args: max_slots=2 must be None with broadcast='always'"):
        RoutedConfig(router="entropy_top_k", router_args={"max_slots": 2, "broadcast": "always"})
