"""Padding adds nothing to sums and counts, whatever it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_peft.losses import LOSSES
from moe_peft.losses.entropy import entropy
from moe_peft.losses.masking import masked_sum, num_valid, shares
from moe_peft.types import Routing, TokenContext
from tests.compare import full_routing, random_routing

NAMES = sorted(LOSSES)


def loss_of(name):
    return LOSSES[name]()


def padded(routing: Routing, before: int, after: int, junk: float) -> Routing:
    """The same tokens between rows of junk that the context calls padding."""

    def pad(tensor, value):
        rows = [tensor.new_full((count, *tensor.shape[1:]), value) for count in (before, after)]
        return torch.cat([rows[0], tensor, rows[1]])

    num_tokens = routing.probs.shape[0]
    valid = torch.tensor([False] * before + [True] * num_tokens + [False] * after)
    return Routing(
        weights=pad(routing.weights, junk),
        experts=None if routing.experts is None else pad(routing.experts, 0),
        logits=pad(routing.logits, junk),
        probs=pad(routing.probs, junk),
        context=TokenContext(training=True, valid=valid),
        extras={name: pad(extra, junk) for name, extra in routing.extras.items()},
    )


def test_masked_sum_leaves_padding_out_even_where_it_is_not_finite():
    routing = padded(random_routing(3, 2), 1, 2, float("nan"))
    values = torch.tensor([float("nan"), 1.0, 2.0, 3.0, float("inf"), float("nan")])
    assert masked_sum(values, routing) == 6.0
    assert num_valid(routing) == 3


def test_without_a_mask_every_token_counts():
    routing = random_routing(3, 2)
    assert num_valid(routing) == 3 and masked_sum(torch.arange(3.0), routing) == 3.0


def test_without_a_valid_token_there_are_none():
    assert num_valid(random_routing(0, 2)) == 0
    assert num_valid(padded(random_routing(0, 2), 2, 0, 0.0)) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("junk", [0.0, 7.0, float("nan")])
def test_every_loss_and_its_gradient_are_blind_to_padding(name, top_k, junk):
    plain = full_routing(13, 4, top_k)
    expected = loss_of(name)(plain)
    (wanted,) = torch.autograd.grad(expected, [plain.logits], allow_unused=True, retain_graph=True)
    for before, after in ((0, 5), (5, 0), (2, 3)):
        value = loss_of(name)(padded(plain, before, after, junk))
        torch.testing.assert_close(value, expected)
        (grad,) = torch.autograd.grad(value, [plain.logits], allow_unused=True, retain_graph=True)
        assert (grad is None) == (wanted is None)
        if grad is not None:
            torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_every_loss_of_no_valid_token_is_finite_with_a_finite_gradient(name, top_k):
    for routing in (full_routing(0, 4, top_k), padded(full_routing(0, 4, top_k), 2, 1, 3.0)):
        weights = routing.weights.detach().requires_grad_()
        probs = routing.probs.detach().requires_grad_()
        logits = routing.logits.detach().requires_grad_()
        leaves = {"weights": weights, "logits": logits, "probs": probs}
        value = loss_of(name)(replace(routing, **leaves, num_experts=4))
        assert value.ndim == 0 and value.item() == 0
        grads = torch.autograd.grad(value, [weights, probs, logits], allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_of_a_float32_decision_is_a_float32_scalar(name):
    routing = full_routing(13, 4, 2)
    extras = {key: extra.float() for key, extra in routing.extras.items()}
    tensors = (routing.weights.float(), routing.experts, routing.logits.float(), routing.probs.float())
    routing = Routing(*tensors, extras=extras)
    value = loss_of(name)(routing)
    assert value.dtype == torch.float32 and value.ndim == 0


def test_shares_sum_to_one_with_finite_gradients_where_there_is_nothing_to_share():
    values = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(shares(values), values / values.sum(-1, keepdim=True), rtol=1e-15, atol=0)
    for scale in (0.0, 1e-45, 1e-30):
        closed = torch.full((2, 3), scale, requires_grad=True)
        for goal in (shares(closed).sum(), entropy(shares(closed)).sum()):
            (grad,) = torch.autograd.grad(goal, closed)
            assert torch.isfinite(goal) and torch.isfinite(grad).all()
