"""Experts that scale and shift: the formula with gradients, a start as the identity, float32 in 16-bit models."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts.film import FilmExperts
from tests.compare import assert_same, random_routing

D, OUT, E, T = 7, 5, 4, 13


def made(**settings):
    torch.manual_seed(0)
    bank = FilmExperts(D, OUT, num_experts=E, r=1, **{"init_weights": False, **settings}).double()
    return bank, torch.randn(T, D).double(), torch.randn(T, OUT, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("top_k", [None, 1, 2, E])
def test_equals_the_formula(top_k):
    bank, x, base = made()
    routing = random_routing(T, E, top_k)
    gates = routing.gate_matrix()
    expected = torch.stack(
        [
            base[t] * (1 + sum(gates[t, e] * bank.c[e] for e in range(E)))
            + sum(gates[t, e] * bank.b[e] for e in range(E))
            for t in range(T)
        ]
    )
    leaves = [base, routing.logits, bank.c, bank.b]
    assert_same(bank(x, base, routing), expected, leaves, leaves)


def test_it_starts_as_the_identity_bit_for_bit_and_keeps_float32():
    bank, x, base = made(init_weights=True)
    assert torch.equal(bank(x, base, random_routing(T, E, 2)), base)
    bank.float().bfloat16()
    assert bank.c.dtype == bank.b.dtype == torch.float32
    out = bank(x.bfloat16(), base.bfloat16(), random_routing(T, E, 2))
    assert out.dtype == torch.bfloat16 and torch.equal(out, base.bfloat16())
