"""Localized balancing: its formula, its values at known routings, and where its minimum lies."""

from __future__ import annotations

import pytest
import torch

from moe_peft.losses import LocalizedBalancing
from moe_peft.types import Routing, TokenContext
from tests import reference
from tests.compare import assert_same, gates_of, random_routing

GROUPS = [1, 1, 0, 0, 1]


def context_of(lengths, groups=None, valid=None):
    sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return TokenContext(
        training=True,
        valid=valid,
        sequences=sequences,
        num_sequences=len(lengths),
        groups=None if groups is None else torch.tensor(groups),
    )


def of_gates(gates_TE, context):
    return Routing(gates_TE, None, gates_TE.log(), gates_TE, context=context)


@pytest.mark.parametrize("mode", ["paper", "specialize"])
@pytest.mark.parametrize("delta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    ("lengths", "padding"),
    [
        ([13, 13, 13], None),
        ([13, 13, 13], "right"),
        ([13, 13, 13], "left"),
        ([5, 1, 20], None),
        ([5, 1, 20], "right"),
        ([1], None),
        ([4, 4, 4], "row"),
    ],
)
def test_equals_the_formula(mode, delta, top_k, lengths, padding):
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    valid = {None: None, "right": positions < 4, "left": positions >= 2, "row": rows != 1}[padding]
    if padding == "left":
        valid = valid | (torch.tensor(lengths)[rows] < 3)
    groups = [0, 1, 0][: len(lengths)]
    routing = random_routing(sum(lengths), 5, top_k, context=context_of(lengths, groups, valid))
    loss = LocalizedBalancing(expert_groups=GROUPS, delta=delta, mode=mode)
    expected = reference.localized_balancing(
        gates_of(routing),
        5,
        sequences=rows.tolist(),
        valid=None if valid is None else valid.tolist(),
        expert_groups=GROUPS,
        groups=groups,
        delta=delta,
        mode=mode,
    )
    assert_same(loss(routing), expected, [routing.logits], [routing.logits])


@pytest.mark.parametrize("num_tokens", [1, 13])
@pytest.mark.parametrize("num_experts", [1, 5])
def test_without_groups_it_balances_all_entries(num_tokens, num_experts):
    routing = random_routing(num_tokens, num_experts)
    expected = reference.localized_balancing(gates_of(routing), num_experts, sequences=[0] * num_tokens)
    assert_same(LocalizedBalancing()(routing), expected, [routing.logits], [routing.logits])


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("num_sequences", "num_experts"), [(1, 2), (2, 6), (5, 4)])
@pytest.mark.parametrize("mode", ["paper", "specialize"])
def test_localized_balancing_at_uniform_routing_is_delta_squared_n_over_n_minus_1(
    delta, num_sequences, num_experts, mode
):
    context = context_of([3] * num_sequences, [s % 2 for s in range(num_sequences)])
    gates = torch.full((3 * num_sequences, num_experts), 1 / num_experts, dtype=torch.float64)
    loss = LocalizedBalancing(expert_groups=[0, 1] * (num_experts // 2), delta=delta, mode=mode)
    n = num_sequences * num_experts
    # The denominator's 1e-10 is 1e-10 * E^2 relative to the squared mean.
    expected = delta**2 * n / (n - 1)
    assert loss(of_gates(gates, context)).item() == pytest.approx(expected, rel=1e-7, abs=1e-15)


def test_scale_of_all_gates_does_not_matter():
    context = context_of([4, 4], [0, 1])
    gates = torch.rand(8, 4, dtype=torch.float64)
    loss = LocalizedBalancing(expert_groups=[1, 1, 0, 0], delta=0.3)
    one, other = (loss(of_gates(s * gates, context)).item() for s in (1.0, 9.0))
    assert one == pytest.approx(other, rel=1e-8) and one > 0


def test_length_of_a_sequence_does_not_matter():
    short = torch.rand(2, 4, dtype=torch.float64)
    loss = LocalizedBalancing(expert_groups=[1, 1, 0, 0], delta=0.3)
    once = loss(of_gates(short, context_of([1, 1], [0, 1])))
    repeated = loss(of_gates(short.repeat_interleave(5, 0)[:8], context_of([5, 3], [0, 1])))
    torch.testing.assert_close(once, repeated)


def test_sum_of_the_authors_code_equals_the_mean_for_rows_of_equal_length():
    gates = torch.rand(12, 4, dtype=torch.float64)
    shift = torch.tensor([[0.7, 0.7, 1.3, 1.3], [1.3, 1.3, 0.7, 0.7], [0.7, 0.7, 1.3, 1.3]], dtype=torch.float64)
    Z = shift * gates.view(3, 4, 4).sum(1)
    loss = LocalizedBalancing(expert_groups=[1, 1, 0, 0], delta=0.3)
    actual = loss(of_gates(gates, context_of([4, 4, 4], [0, 1, 0])))
    torch.testing.assert_close(actual, Z.var() / Z.mean() ** 2, rtol=1e-7, atol=0)


def test_packed_documents_equal_rows_of_their_own():
    gates = torch.rand(9, 4, dtype=torch.float64)
    loss = LocalizedBalancing(expert_groups=[1, 1, 0, 0], delta=0.3)
    packed = loss(of_gates(gates, context_of([2, 4, 3], [0, 1, 1])))
    rows = torch.rand(12, 4, dtype=torch.float64)
    valid = torch.tensor([True, True, False, False] + [True] * 4 + [True] * 3 + [False])
    rows[valid] = gates
    torch.testing.assert_close(loss(of_gates(rows, context_of([4, 4, 4], [0, 1, 1], valid))), packed)


def minimise(mode, delta, expert_groups, groups):
    """Descend on the loss alone, over one free softmax row per sequence; returns Q."""
    torch.manual_seed(0)
    logits = (0.1 * torch.randn(len(groups), len(expert_groups), dtype=torch.float64)).requires_grad_()
    context = context_of([1] * len(groups), groups)
    loss = LocalizedBalancing(expert_groups=expert_groups, delta=delta, mode=mode)
    optimizer = torch.optim.LBFGS([logits], max_iter=60, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = loss(of_gates(logits.softmax(-1), context))
        value.backward()
        return value

    optimizer.step(closure)
    assert closure().item() < 1e-8
    return logits.softmax(-1).detach()


@pytest.mark.parametrize("delta", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("mode", ["paper", "specialize"])
def test_descent_on_localized_balancing_alone_reaches_the_closed_form_ratio(delta, mode):
    Q = minimise(mode, delta, [1, 1, 0, 0], [0, 1])
    own, others = torch.stack([Q[0, 2:], Q[1, :2]]).mean(), torch.stack([Q[0, :2], Q[1, 2:]]).mean()
    expected = (1 - delta) / (1 + delta) if mode == "paper" else (1 + delta) / (1 - delta)
    assert (own / others).item() == pytest.approx(expected, rel=1e-3)


def test_three_groups_of_the_paper_mode_avoid_their_own_experts():
    # Why the configuration refuses three groups in this mode: the owner is the one that is avoided.
    Q = minimise("paper", 0.5, [0, 0, 1, 1, 2, 2], [0, 1, 2])
    own = torch.stack([Q[m, 2 * m : 2 * m + 2].sum() for m in range(3)])
    torch.testing.assert_close(own, torch.full((3,), 1 / 7, dtype=torch.float64), rtol=1e-2, atol=0)
    Q = minimise("specialize", 0.5, [0, 0, 1, 1, 2, 2], [0, 1, 2])
    own = torch.stack([Q[m, 2 * m : 2 * m + 2].sum() for m in range(3)])
    torch.testing.assert_close(own, torch.full((3,), 3 / 5, dtype=torch.float64), rtol=1e-2, atol=0)


def test_expert_groups_without_sample_groups_say_how_to_bring_them():
    loss = LocalizedBalancing(expert_groups=[1, 0], delta=0.1, group_column="domain")
    with pytest.raises(ValueError, match=r"expert_groups=\[1, 0\] needs the group of every sample.*'domain'"):
        loss(random_routing(3, 2))
