"""Slots of sparse and dense decisions."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_peft.ops.slots import slots_of
from tests.compare import random_routing


def test_slots_give_the_gates_of_every_decision():
    for top_k in (None, 1, 3, 5):
        routing = random_routing(7, 5, top_k)
        index_TK, weights_TK = slots_of(routing)
        gates = torch.zeros(7, 5, dtype=torch.float64).scatter_add(1, index_TK, weights_TK)
        torch.testing.assert_close(gates, routing.gate_matrix())


def test_a_slot_without_an_expert_weighs_nothing():
    routing = random_routing(3, 5, 2)
    index_TK, weights_TK = slots_of(replace(routing, experts=torch.full_like(routing.experts, 5)))
    assert index_TK.max() < 5 and weights_TK.eq(0).all()
