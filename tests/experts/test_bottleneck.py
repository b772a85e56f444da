"""The bank of bottleneck experts: the formula, its gradient, dropout between the matrices, no scale and no merge."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_peft.experts import BottleneckExperts
from moe_peft.types import TokenContext
from tests import perft_reference
from tests.compare import assert_same, gates_of, random_routing

D, OUT, E, R = 7, 5, 4, 3
SIZES = [(1, None, None), (E, None, None), (E, 2, 3), (E, E, None)]
FORMULAS = {
    "silu": lambda h: h * torch.sigmoid(h),
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "relu": lambda h: h * (h > 0),
}


def bank(num_experts=E, **kwargs):
    torch.manual_seed(0)
    return BottleneckExperts(D, OUT, num_experts=num_experts, r=R, **{"init_weights": False, **kwargs}).double()


def inputs(num_tokens):
    torch.manual_seed(1)
    x = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(num_tokens, OUT, dtype=torch.float64)


@pytest.mark.parametrize("implementation", ["eager", "dense"])
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("num_tokens", [1, 13])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "unused"), [(1, None, None), (E, None, None), (E, 2, 3), (E, E, None)]
)
def test_equals_the_formula(implementation, activation, num_tokens, num_experts, top_k, unused):
    experts = bank(num_experts, activation=activation, experts_implementation=implementation)
    x, base = inputs(num_tokens)
    routing = random_routing(num_tokens, num_experts, top_k, unused=unused)
    expected = perft_reference.beside(
        base, x, experts.A, experts.B.mT, gates_of(routing), scaling=1.0, act=FORMULAS[activation]
    )
    leaves = [x, experts.A, experts.B, routing.logits]
    assert_same(experts(x, base, routing), expected, leaves, leaves)


def test_no_tokens_give_no_output():
    x, base = inputs(0)
    assert bank()(x, base, random_routing(0, E)).shape == (0, OUT)


def test_fresh_bank_is_the_identity_bit_for_bit():
    x, base = inputs(13)
    assert torch.equal(bank(init_weights=True)(x, base, random_routing(13, E)), base)


def test_the_gate_scales_what_the_activation_has_made():
    x, base = inputs(13)
    experts, routing = bank(), random_routing(13, E, 1)
    doubled = type(routing)(2 * routing.weights, routing.experts, routing.logits, routing.probs)
    torch.testing.assert_close(experts(x, base, doubled) - base, 2 * (experts(x, base, routing) - base))


def test_dropout_acts_between_the_down_matrix_and_the_activation_in_training():
    x, base = inputs(13)
    experts = bank(lora_dropout=0.5)
    routing = random_routing(13, E, context=TokenContext(training=True))
    torch.manual_seed(3)
    actual = experts(x, base, routing)
    torch.manual_seed(3)
    h = F.silu(F.dropout(x @ experts.A.reshape(-1, D).T, 0.5)).view(13, E, R)
    expected = base + torch.einsum("te,ter,ero->to", routing.weights, h, experts.B)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(experts(x, base, random_routing(13, E)), bank()(x, base, random_routing(13, E)))


def test_an_adapter_with_an_activation_is_no_matrix():
    assert not bank().mergeable


@pytest.mark.parametrize("top_k", [None, 2])
def test_experts_may_have_activations_of_their_own_in_turn(top_k):
    names = ["relu", "gelu", "silu"]
    experts, (x, base) = bank(activations=names), inputs(13)
    routing = random_routing(13, E, top_k)
    gates = routing.gate_matrix()
    rows = [gates[:, e : e + 1] * (FORMULAS[names[e % 3]](x @ experts.A[e].T) @ experts.B[e]) for e in range(E)]
    leaves = [x, experts.A, experts.B, routing.logits]
    assert_same(experts(x, base, routing), base + sum(rows), leaves, leaves)
    assert experts.implementation(1, 1) == "dense"


def test_activations_of_their_own_go_with_the_products_over_all_experts_alone():
    with pytest.raises(ValueError, match="experts_implementation='eager' must be 'auto' or 'dense'"):
        bank(activations=["relu"], experts_implementation="eager")
