"""Null experts take slots and weigh nothing, and balance fills m / (E + m) of the slots with them."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts import LowRankExperts
from moe_peft.losses.null_load_balancing import NullLoadBalancing
from moe_peft.routers.null_top_k import NullTopK
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import TRAINING, D, E, T, linear, rows


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("top_k", "num_null"), [(1, 1), (3, 2), (4, 6)])
def test_equals_the_formula(normalise, top_k, num_null):
    made, x = linear(NullTopK(top_k=top_k, num_null=num_null, norm_topk_prob=normalise))
    routing, expected = made(x, TokenContext()), []
    assert made.weight.shape == (E + num_null, D) and routing.probs.shape == (T, E)
    for t in range(T):
        p = torch.stack([(made.weight[j] * x[t]).sum() for j in range(E + num_null)]).softmax(-1)
        real = [j for j in sorted(range(E + num_null), key=lambda j: -p[j].item())[:top_k] if j < E]
        total = sum(p[e] for e in real) if normalise and real else 1.0
        expected.append([p[e] / total if e in real else torch.zeros(()).double() for e in range(E)])
    assert_same(routing.gate_matrix(), rows(expected), [x, made.weight], [x, made.weight])
    assert torch.equal(routing.request_matrix(), (routing.gate_matrix() > 0).double())


@pytest.mark.parametrize("normalise", [False, True])
def test_a_token_of_nulls_alone_is_left_as_it_is(normalise):
    made, x = linear(NullTopK(top_k=2, num_null=3, norm_topk_prob=normalise))
    made.weight.data[E:] = 5 * x[0].detach()
    bank = LowRankExperts(D, 5, num_experts=E, r=2, scaling=1.0, init_weights=False).double()
    base = torch.randn(T, 5).double()
    out = bank(x, base, made(x, TokenContext()))
    assert torch.equal(out[0], base[0])
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(made.weight.grad).all()


def test_a_dropped_gate_leaves_its_slot_empty():
    made, x = linear(NullTopK(top_k=3, num_null=1, expert_dropout=0.7), expert_dropout=0.7)
    routing = made(x, TRAINING)
    assert ((routing.weights > 0) == (routing.experts < E)).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_share_of_empty_slots_tends_to_that_of_the_nulls(seed):
    made, _ = linear(NullTopK(top_k=3, num_null=3))
    torch.manual_seed(seed)
    made.weight.data = 0.5 * torch.randn_like(made.weight)
    x, loss = torch.randn(128, D).double(), NullLoadBalancing()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss(made(x, TRAINING)).backward()
        optimizer.step()
    share = (made(x, TokenContext()).experts == E).double().mean().item()
    assert share == pytest.approx(3 / (E + 3), abs=0.06)
