"""Load balancing in both scales, by formula and at the routings where its value is known."""

from __future__ import annotations

import pytest
import torch

from moe_peft.losses import gshard_load_balancing, load_balancing
from moe_peft.types import Routing, TokenContext
from tests import reference
from tests.compare import as_lists, assert_same, chosen_of, random_routing

LOSSES = [(load_balancing, reference.load_balancing), (gshard_load_balancing, reference.gshard_load_balancing)]


@pytest.mark.parametrize(("loss", "formula"), LOSSES)
@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 1), (5, 3), (5, 5), (5, None)])
def test_equals_the_formula(loss, formula, num_tokens, num_experts, top_k):
    valid = torch.arange(num_tokens) % 4 != 1
    routing = random_routing(num_tokens, num_experts, top_k, context=TokenContext(valid=valid))
    expected = formula(as_lists(routing.probs), chosen_of(routing), valid.tolist())
    assert_same(loss(routing), expected, [routing.logits], [routing.logits])


def balanced(num_experts, top_k):
    """Uniform gates, and token t asks for the experts t, t + 1, ... modulo E: K requests for each expert."""
    probs = torch.full((num_experts, num_experts), 1 / num_experts, dtype=torch.float64)
    experts = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts
    return Routing(probs.gather(1, experts), experts, probs.log(), probs)


def collapsed(num_experts):
    """Every token gives all of its probability to expert 0, and asks for it alone."""
    probs = torch.zeros(6, num_experts, dtype=torch.float64)
    probs[:, 0] = 1.0
    experts = torch.zeros(6, 1, dtype=torch.long)
    return Routing(probs[:, :1], experts, probs, probs)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 3), (6, 2), (6, 6)])
def test_balanced_assignment_gives_k_over_e_squared(num_experts, top_k):
    value = gshard_load_balancing(balanced(num_experts, top_k))
    assert value.item() == pytest.approx(top_k / num_experts**2, rel=1e-12)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 3), (6, 6)])
def test_balanced_assignment_gives_one_for_every_k(num_experts, top_k):
    assert load_balancing(balanced(num_experts, top_k)).item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("num_experts", [1, 4, 6])
def test_collapsed_routing_gives_one_over_e_and_e(num_experts):
    assert gshard_load_balancing(collapsed(num_experts)).item() == pytest.approx(1 / num_experts, rel=1e-12)
    assert load_balancing(collapsed(num_experts)).item() == pytest.approx(num_experts, rel=1e-12)


def test_the_two_scales_differ_by_k_over_e_squared():
    routing = random_routing(63, 5, 3)
    ratio = gshard_load_balancing(routing) / load_balancing(routing)
    assert ratio.item() == pytest.approx(3 / 25, rel=1e-12)


@pytest.mark.parametrize("loss", [load_balancing, gshard_load_balancing])
def test_requests_are_counted_before_any_capacity(loss):
    routing = random_routing(13, 4, 2)
    dropped = torch.zeros(13, 2, dtype=torch.bool)
    dropped[7:] = True
    served = Routing(
        routing.weights.masked_fill(dropped, 0.0), routing.experts, routing.logits, routing.probs, dropped=dropped
    )
    assert torch.equal(loss(served), loss(routing))


@pytest.mark.parametrize("loss", [load_balancing, gshard_load_balancing])
def test_gradient_flows_through_the_probabilities_alone(loss):
    routing = random_routing(13, 4, 2)
    weights = routing.weights.detach().requires_grad_()
    probs = routing.probs.detach().requires_grad_()
    value = loss(Routing(weights, routing.experts, routing.logits, probs))
    grad_weights, grad_probs = torch.autograd.grad(value, [weights, probs], allow_unused=True)
    assert grad_weights is None and grad_probs.abs().sum() > 0


def test_descent_moves_probability_away_from_the_busiest_expert():
    torch.manual_seed(0)
    logits = (torch.randn(64, 4) + torch.tensor([2.0, 0.0, 0.0, 0.0])).requires_grad_()
    probs = logits.softmax(-1)
    weights, experts = probs.topk(1, -1)
    load_balancing(Routing(weights, experts, logits, probs)).backward()
    after = (logits - 100.0 * logits.grad).softmax(-1).mean(0)
    assert after[0] < probs.mean(0)[0] - 0.01
