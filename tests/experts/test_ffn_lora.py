"""Experts that are FFNs with pairs: the sum of whole FFNs under weights that sum to one, differences under others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from moe_peft.experts.ffn_lora import FfnLoraExperts
from moe_peft.types import TokenContext
from tests.compare import assert_same, random_routing

E, D, INNER, OUT, R, SCALING = 4, 7, 11, 5, 2, 1.7
W1, W3, W2 = (torch.randn(*shape).double() for shape in ((INNER, D), (INNER, D), (OUT, INNER)))


def bank_of(**given) -> FfnLoraExperts:
    torch.manual_seed(0)
    sizes = {"num_experts": E, "r": R, "inner_features": INNER, "scaling": SCALING, "init_weights": False}
    return FfnLoraExperts(D, OUT, **{**sizes, **given}).double()


def states_of(x):
    u, t = x @ W1.T, x @ W3.T
    return x, u, t, F.silu(u) * t


def with_adapter(bank, x, routing):
    change, added = bank(*states_of(x), routing, act=F.silu)
    return (states_of(x)[3] + change) @ W2.T + added


def whole_ffn(bank, e, x):
    """One expert by the paper: each matrix of the FFN with its pair added."""
    gate, up, down = (
        frozen + SCALING * (getattr(bank, f"{name}_A")[e].T @ getattr(bank, f"{name}_B")[e]).T
        for name, frozen in (("gate", W1), ("up", W3), ("down", W2))
    )
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("top_k", [None, 1, 2, E])
def test_it_is_the_sum_of_whole_ffns_where_weights_sum_to_one(num_tokens, top_k):
    bank, x = bank_of(), torch.randn(num_tokens, D).double().requires_grad_()
    routing = random_routing(num_tokens, E, top_k, unused=1)
    routing = replace(routing, weights=routing.weights / routing.weights.sum(-1, keepdim=True))
    gates = routing.gate_matrix()
    expected = sum((gates[:, e : e + 1] * whole_ffn(bank, e, x) for e in range(E)), torch.zeros(num_tokens, OUT))
    leaves = [x, routing.logits, *bank.parameters()]
    assert_same(with_adapter(bank, x, routing), expected, leaves, leaves, tolerance=1e-10)


def test_under_other_weights_it_is_the_ffn_and_the_weighed_differences_to_it():
    bank, x = bank_of(), torch.randn(13, D).double().requires_grad_()
    routing = random_routing(13, E, 2)
    gates, frozen = routing.gate_matrix(), states_of(x)[3] @ W2.T
    expected = frozen + sum(gates[:, e : e + 1] * (whole_ffn(bank, e, x) - frozen) for e in range(E))
    leaves = [x, routing.logits, *bank.parameters()]
    assert_same(with_adapter(bank, x, routing), expected, leaves, leaves, tolerance=1e-10)


def test_it_starts_by_changing_nothing_bit_for_bit_under_any_weights():
    bank, x = bank_of(init_weights=True).float(), torch.randn(9, D)
    u, t = x @ W1.float().T, x @ W3.float().T
    change, added = bank(x, u, t, F.silu(u) * t, random_routing(9, E, 2), act=F.silu)
    assert not change.any() and not added.any()


def test_dropped_slots_and_slots_without_an_expert_change_nothing():
    bank, x = bank_of(), torch.randn(6, D).double()
    routing = random_routing(6, E, 2)
    routing.experts[2:] = E
    change, added = bank(*states_of(x), routing, act=F.silu)
    assert change[:2].any() and not change[2:].any() and not added[2:].any()


def test_dropout_acts_in_training_passes_alone():
    bank, x = bank_of(lora_dropout=0.5), torch.randn(6, D).double()
    same = [bank(*states_of(x), random_routing(6, E, 2), act=F.silu)[1] for _ in range(2)]
    assert torch.equal(*same)
    training = random_routing(6, E, 2, context=TokenContext(training=True))
    assert not torch.equal(bank(*states_of(x), training, act=F.silu)[1], same[0])
