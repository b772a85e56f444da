"""Top-p keeps the fewest experts that hold a share of the probability: more for tokens that are unsure."""

from __future__ import annotations

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.routers.top_p import TopP
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import TRAINING, E, T, linear, rows


@pytest.mark.parametrize(("p", "max_k"), [(0.4, None), (0.8, None), (0.8, 2), (1.0, None)])
def test_equals_the_formula(p, max_k):
    made, x = linear(TopP(p=p, max_k=max_k))
    routing, expected, counts = made(x, TokenContext()), [], []
    for t in range(T):
        probs = torch.stack([(made.weight[e] * x[t]).sum() for e in range(E)]).softmax(-1)
        kept, mass = [], 0.0
        for e in sorted(range(E), key=lambda e: -probs[e].item())[:max_k]:
            if mass < p or p == 1:
                kept.append(e)
            mass += probs[e].item()
        counts.append(len(kept))
        expected.append([probs[e] if e in kept else torch.zeros(()).double() for e in range(E)])
    assert_same(routing.gate_matrix(), rows(expected), [x, made.weight], [x, made.weight])
    assert routing.request_matrix().sum(-1).tolist() == counts and (max_k is None) == (made.num_slots == E)
    assert p == 1 or len(set(counts)) > 1


@pytest.mark.parametrize("num_experts", [4, 10, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_of_even_probabilities_is_half_of_the_experts_whatever_the_rounding(num_experts, dtype):
    probs = torch.full((3, num_experts), 1 / num_experts, dtype=dtype)
    routing = TopP(p=0.5)(probs.log(), probs, TokenContext(), num_experts)
    assert routing.request_matrix().sum(-1).tolist() == [num_experts / 2] * 3


def test_unsure_tokens_use_more_experts():
    logits = torch.tensor([[8.0, 0, 0, 0], [2.0, 1.5, 0, 0], [0.0, 0, 0, 0]]).double()
    routing = TopP(p=0.7)(logits, logits.softmax(-1), TokenContext(), 4)
    assert routing.request_matrix().sum(-1).tolist() == [1, 2, 3]


def test_dropped_gates_are_no_requests():
    made, x = linear(TopP(p=1.0), expert_dropout=0.6)
    routing = made(x, TRAINING)
    assert torch.equal(routing.request_matrix(), (routing.probs > 0).double())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 2}, "top_k=2 must be left at None"),
        ({"router_args": {"p": 0.0}}, "p=0.0 must be a number above 0, up to 1"),
        ({"router_args": {"max_k": 9}}, "router_args: max_k=9 must be at most num_experts=8"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RoutedConfig(router="top_p", **fields)
