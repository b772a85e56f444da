"""Experts behind one down matrix, whose elements may be dropped in training."""

from __future__ import annotations

import torch

from moe_peft.experts.shared_down import SharedDownExperts
from moe_peft.types import TokenContext
from tests.compare import random_routing

from .bank import E, T, assert_adds, assert_merges, made

TRAINING = TokenContext(training=True)


def test_adds_the_weighed_sum_of_its_matrices():
    bank, x, base = made(SharedDownExperts)
    assert_adds(bank, x, base, lambda e: bank.B[e].T @ bank.A)


def test_merges_under_constant_weights():
    assert_merges("shared_down")


def test_elements_of_the_down_matrix_are_dropped_in_training_alone():
    bank, x, base = made(SharedDownExperts, down_dropout=0.5)
    plain, _, _ = made(SharedDownExperts)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(torch.ones_like(bank.A), 0.5)
    plain.A.data *= kept
    torch.manual_seed(3)
    routing = random_routing(T, E, context=TRAINING)
    torch.testing.assert_close(bank(x, base, routing), plain(x, base, routing))
    assert bank.shared_rows(TRAINING) is None and bank.shared_rows(TokenContext()) is bank.A
    bank.down_dropout.p = 0.0
    assert bank.shared_rows(TRAINING) is bank.A


def test_asking_for_shared_rows_draws_nothing():
    bank, _, _ = made(SharedDownExperts, down_dropout=0.5, lora_dropout=0.5)
    before = torch.get_rng_state()
    bank.shared_rows(TRAINING)
    assert torch.equal(before, torch.get_rng_state())
