"""An even assignment in training, near the best of all, and the largest in evaluation; padding takes no place."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.routers.balanced_assignment import STEPS, BalancedAssignment, assign
from moe_peft.routers.sigmoid import Sigmoid
from moe_peft.routers.task_table import MASKED
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import TRAINING, E, T, linear


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "experts"), [(1, 3), (5, 2), (6, 3), (7, 3), (4, 4)])
def test_the_sum_is_near_that_of_the_best_even_assignment(n, experts, seed):
    z = torch.randn(n, experts, generator=torch.Generator().manual_seed(seed)).double()
    places = -(-n // experts)
    every = [a for a in itertools.product(range(experts), repeat=n) if max(a.count(e) for e in a) <= places]
    best = max(sum(z[t, e].item() for t, e in enumerate(a)) for a in every)
    found = assign(z, places)
    assert found.bincount(minlength=experts).max() <= places
    assert z.gather(1, found[:, None]).sum() >= best - n * (z.max() - z.min()) / STEPS


@pytest.mark.parametrize("seed", range(4))
def test_experts_out_of_sight_make_the_assignment_of_the_others_no_coarser(seed):
    n, experts = 6, 3
    z = torch.randn(n, experts, generator=torch.Generator().manual_seed(seed)).double()
    seen = torch.ones(n, experts, dtype=torch.bool)
    seen[[0, 1], [0, 2]] = False
    every = [a for a in itertools.product(range(experts), repeat=n) if max(a.count(e) for e in a) <= 2]
    allowed = [a for a in every if all(seen[t, e] for t, e in enumerate(a))]
    best = max(sum(z[t, e].item() for t, e in enumerate(a)) for a in allowed)
    found = assign(z.masked_fill(~seen, MASKED), 2)
    assert found.bincount(minlength=experts).max() <= 2 and seen[range(n), found].all()
    assert z.gather(1, found[:, None]).sum() >= best - n * 2 * (z.max() - z.min()) / STEPS


def test_a_compiled_training_step_says_why_it_has_no_single_graph():
    made, x = linear(BalancedAssignment())
    known = TokenContext(training=True, sequences=torch.zeros(T, dtype=torch.long), num_sequences=1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="auction on the host"):
        torch.compile(made, backend="eager", fullgraph=True)(x, known)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(made, backend="eager")(x, known).experts, made(x, known).experts)


@pytest.mark.parametrize("n", [0, 1, 63])
def test_equal_scores_and_one_expert_end_too(n):
    assert assign(torch.zeros(n, 4), -(-n // 4)).bincount(minlength=4).max() <= -(-n // 4)
    assert not assign(torch.randn(n, 1), n).any()


def test_training_is_even_in_each_sequence_and_weighs_by_the_gate():
    made, x = linear(BalancedAssignment(), Sigmoid())
    owner = torch.tensor([0] * 8 + [1] * 5)
    valid = torch.arange(T) != 7
    known = TokenContext(training=True, sequences=owner, num_sequences=2, valid=valid)
    routing = made(x, known)
    for sequence, n in ((0, 7), (1, 5)):
        load = routing.experts[valid & (owner == sequence), 0].bincount(minlength=E)
        assert load.sum() == n and load.max() <= -(-n // E)
    p = (x @ made.weight.T).sigmoid()
    assert_same(routing.weights, p.gather(1, routing.experts), [x, made.weight], [x, made.weight])
    other = made(torch.where(valid[:, None], x, 9.0), known)
    assert torch.equal(other.experts[valid], routing.experts[valid])


def test_evaluation_and_passes_that_nothing_may_perturb_take_the_largest():
    made, x = linear(BalancedAssignment())
    found = made(x, TokenContext())
    assert torch.equal(found.experts[:, 0], found.probs.argmax(-1))
    made.perturbs_training = False
    assert torch.equal(made(x, TRAINING).experts, found.experts)


def test_slices_of_rows_and_causal_models_are_refused():
    made, x = linear(BalancedAssignment())
    with pytest.raises(ValueError, match="chunk_size_feed_forward=0"):
        made(x, TokenContext(training=True, part=T))
    with pytest.raises(ValueError, match="allow_non_causal"):
        RoutedConfig(router="balanced_assignment", task_type="CAUSAL_LM")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e30])
@pytest.mark.parametrize("width", [0.0, 1e-30, 1e-3, 1e6])
def test_an_auction_ends_and_is_even_whatever_the_size_of_the_scores(width, offset, dtype):
    torch.manual_seed(0)
    experts = assign(torch.randn(12, 4, dtype=dtype) * width + offset, 3)
    assert experts.bincount(minlength=4).tolist() == [3] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_hold_up_no_training(value):
    z = torch.zeros(6, 3)
    z[2, 1] = value
    assert assign(z, 2).shape == (6,)
