"""Capacity: who is served, by hand and against a queue per sequence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe_peft.routers import CapacityRouter, TopKRouter
from moe_peft.routers.capacity import over_capacity, over_capacity_by_score
from moe_peft.types import Routing, TokenContext
from tests import reference
from tests.compare import chosen_of, random_routing

LAYOUTS = {
    "one row": ([63], [63]),
    "one token": ([1], [1]),
    "rows": ([13, 13, 13], [13, 13, 13]),
    "right padding": ([13, 13, 13], [13, 1, 6]),
    "left padding": ([13, 13, 13], [-13, -1, -6]),
    "row of padding": ([13, 13], [13, 0]),
    "packed": ([5, 8, 1, 12], [5, 8, 1, 12]),
    "packed with padding": ([5, 8, 1, 12], [5, 8, 1, -4]),
}


def context_of(layout, training=True):
    """Sequences of the first lengths, of which the second many tokens are valid (negative: the last ones)."""
    lengths, valid_lengths = LAYOUTS[layout]
    sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    valid = []
    for length, count in zip(lengths, valid_lengths, strict=True):
        row = [position < abs(count) for position in range(length)]
        valid += row[::-1] if count < 0 else row
    # Rows of one length are known as such.
    num_rows = len(lengths) if len(set(lengths)) == 1 else 1
    return TokenContext(
        training=training,
        valid=torch.tensor(valid),
        sequences=sequences,
        num_sequences=len(lengths),
        num_rows=num_rows,
    )


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("by_choice", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 3), (4, 4)])
@pytest.mark.parametrize("capacity_factor", [0.01, 0.5, 1.0, 1.25])
def test_equals_a_queue_per_sequence(layout, by_choice, num_experts, top_k, capacity_factor):
    context = context_of(layout)
    routing = random_routing(len(context.sequences), num_experts, top_k, context=context)
    dropped = over_capacity(routing, capacity_factor, by_choice=by_choice)
    expected = reference.overflow(
        chosen_of(routing),
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=capacity_factor,
        sequences=context.sequences.tolist(),
        valid=context.valid.tolist(),
        by_choice=by_choice,
    )
    assert {(t, int(routing.experts[t, k])) for t, k in dropped.nonzero().tolist()} == expected


@pytest.mark.parametrize("layout", ["rows", "right padding", "left padding", "row of padding"])
@pytest.mark.parametrize("by_choice", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_are_served_as_sequences_of_unknown_lengths_are(layout, by_choice, padded):
    context = context_of(layout)
    context = context if padded else replace(context, valid=None)
    routing = random_routing(len(context.sequences), 4, 2, context=context)
    unknown = replace(routing, context=replace(context, num_rows=1))
    by_rows = over_capacity(routing, 0.5, by_choice=by_choice)
    assert by_rows.any() and torch.equal(by_rows, over_capacity(unknown, 0.5, by_choice=by_choice))


def test_the_layouts_do_overflow():
    routing = random_routing(63, 4, 2, context=context_of("one row"))
    assert over_capacity(routing, 0.5).any() and not over_capacity(routing, 0.5).all()


def collapsed(num_tokens, context):
    """All tokens ask for expert 2 of 4 alone."""
    probs = torch.full((num_tokens, 4), 0.1)
    probs[:, 2] = 0.7
    experts = torch.full((num_tokens, 1), 2)
    return Routing(weights=probs[:, 2:3], experts=experts, logits=probs.log(), probs=probs, context=context)


def test_first_c_tokens_are_served():
    # C = ceil(1.25 * 1 * 10 / 4) = 4
    dropped = over_capacity(collapsed(10, TokenContext(training=True)), 1.25)
    assert dropped.squeeze(1).tolist() == [False] * 4 + [True] * 6


def test_every_expert_serves_at_least_one_token():
    dropped = over_capacity(collapsed(10, TokenContext(training=True)), 1e-6)
    assert dropped.squeeze(1).tolist() == [False] + [True] * 9


def test_padding_takes_no_place_and_is_not_dropped():
    valid = torch.tensor([False] * 3 + [True] * 7)
    # C = ceil(1 * 1 * 7 / 4) = 2, counted from the first valid token
    dropped = over_capacity(collapsed(10, TokenContext(training=True, valid=valid)), 1.0)
    assert dropped.squeeze(1).tolist() == [False] * 5 + [True] * 5


@pytest.mark.parametrize("by_choice", [False, True])
def test_the_amount_and_side_of_padding_do_not_matter(by_choice):
    plain = random_routing(9, 4, 2, context=TokenContext(training=True))
    expected = over_capacity(plain, 0.5, by_choice=by_choice)
    for before, after in ((0, 3), (4, 0), (2, 5)):
        padding = random_routing(before + after, 4, 2, seed=9)
        parts = (padding.probs[:before], plain.probs, padding.probs[before:])
        probs = torch.cat(parts)
        weights, experts = probs.topk(2, -1)
        valid = torch.tensor([False] * before + [True] * 9 + [False] * after)
        context = TokenContext(training=True, valid=valid)
        padded = Routing(weights=weights, experts=experts, logits=probs.log(), probs=probs, context=context)
        dropped = over_capacity(padded, 0.5, by_choice=by_choice)
        assert torch.equal(dropped[before : before + 9], expected)
        assert not dropped[:before].any() and not dropped[before + 9 :].any()


@pytest.mark.parametrize("by_choice", [False, True])
def test_packed_documents_are_served_as_if_each_had_its_own_row(by_choice):
    context = context_of("packed")
    packed = random_routing(26, 4, 2, context=context)
    together = over_capacity(packed, 0.5, by_choice=by_choice)
    assert together.any()
    alone = []
    for s in range(4):
        rows = context.sequences == s
        routing = Routing(
            packed.weights[rows],
            packed.experts[rows],
            packed.logits[rows],
            packed.probs[rows],
            context=TokenContext(training=True),
        )
        alone.append(over_capacity(routing, 0.5, by_choice=by_choice))
    assert torch.equal(together, torch.cat(alone))


def earlier_decision_changes(order, trials=200):
    """In how many trials a change of the tokens from position 8 on changes the gates of an earlier token."""
    torch.manual_seed(0)
    changes = 0
    for _ in range(trials):
        router = CapacityRouter(6, 4, top_k=2, capacity_factor=0.75, capacity_order=order)
        x = torch.randn(16, 6)
        other = torch.cat([x[:8], torch.randn(8, 6)])
        context = TokenContext(training=True)
        one, two = router(x, context).gate_matrix(), router(other, context).gate_matrix()
        changes += not torch.equal(one[:8], two[:8])
    return changes


def test_future_tokens_never_change_earlier_decisions():
    assert earlier_decision_changes("position") == 0


def test_choice_order_lets_future_tokens_change_earlier_decisions():
    assert earlier_decision_changes("choice") > 20


@pytest.mark.parametrize(("order", "causal"), [("position", True), ("choice", False), ("probability", False)])
def test_router_says_whether_it_is_causal(order, causal):
    assert CapacityRouter(6, 4, top_k=2, capacity_order=order).causal is causal


def test_weight_of_a_dropped_pair_is_zero_and_the_others_are_unchanged():
    torch.manual_seed(0)
    router = CapacityRouter(6, 4, top_k=2, capacity_factor=0.5)
    x = torch.randn(16, 6)
    free = TopKRouter(6, 4, top_k=2)
    free.weight = router.weight
    routing, unlimited = router(x, TokenContext(training=True)), free(x, TokenContext(training=True))
    assert routing.dropped.any() and not routing.dropped.all()
    assert torch.equal(routing.weights, torch.where(routing.dropped, 0.0, unlimited.weights))
    assert torch.equal(routing.request_matrix(), unlimited.request_matrix())


def test_no_capacity_outside_training():
    router = CapacityRouter(6, 4, top_k=2, capacity_factor=0.1)
    routing = router(torch.randn(16, 6), TokenContext())
    assert routing.dropped is None
    torch.testing.assert_close(routing.weights, routing.probs.gather(1, routing.experts))


def test_slots_without_an_expert_take_no_place():
    torch.manual_seed(0)
    router = CapacityRouter(6, 4, top_k=3, capacity_factor=0.5, expert_dropout=0.5)
    routing = router(torch.randn(63, 6), TokenContext(training=True))
    empty = routing.experts == 4
    assert empty.any() and routing.dropped.any()
    assert not routing.dropped[empty].any()
    expected = reference.overflow(
        chosen_of(routing),
        num_experts=4,
        top_k=3,
        capacity_factor=0.5,
        sequences=[0] * 63,
        valid=[True] * 63,
    )
    assert {(t, int(routing.experts[t, k])) for t, k in routing.dropped.nonzero().tolist()} == expected


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_by_probability_each_expert_keeps_the_requests_it_is_surest_of(top_k):
    valid, owner = torch.arange(14) % 5 != 3, torch.arange(14) // 7
    context = TokenContext(training=True, valid=valid, sequences=owner, num_sequences=2, num_rows=2)
    routing = random_routing(14, 4, top_k, context=context)
    expected = torch.zeros_like(routing.experts, dtype=torch.bool)
    for s in range(2):
        for e in range(4):
            asked = [t for t in range(14) if owner[t] == s and valid[t] and e in routing.experts[t]]
            places = max(1, math.ceil(0.5 * top_k * int((valid & (owner == s)).sum()) / 4))
            for t in sorted(asked, key=lambda t: -routing.probs[t, e].item())[places:]:
                expected[t] |= routing.experts[t] == e
    assert torch.equal(over_capacity_by_score(routing, 0.5), expected) and (expected.any() or top_k == 1)


def test_a_router_with_places_by_probability_keeps_them_and_drops_the_others():
    router = CapacityRouter(5, 4, top_k=2, capacity_factor=0.5, capacity_order="probability").double()
    routing = router(torch.randn(16, 5).double(), TokenContext(training=True))
    assert torch.equal(routing.dropped, over_capacity_by_score(routing, 0.5)) and routing.dropped.any()
    assert not routing.weights[routing.dropped].any()
