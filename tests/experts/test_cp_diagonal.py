"""Experts that differ by a diagonal: what each adds, the start, and a price that does not grow with their number."""

from __future__ import annotations

import torch

from moe_peft.experts.cp_diagonal import CpDiagonalExperts

from .bank import OUT, D, E, R, assert_adds, assert_merges, made


def test_adds_the_weighed_sum_of_its_matrices():
    bank, x, base = made(CpDiagonalExperts)
    assert_adds(bank, x, base, lambda e: bank.B.T @ torch.diag(bank.c[e]) @ bank.A)


def test_merges_under_constant_weights():
    assert_merges("cp_diagonal")


def test_diagonals_start_around_one_and_an_expert_costs_r_parameters():
    torch.manual_seed(0)
    bank = CpDiagonalExperts(D, OUT, num_experts=200, r=50, scaling=1.0)
    assert abs(bank.c.mean().item() - 1) < 0.05 and abs(bank.c.std().item() - 1) < 0.05 and not bank.B.any()
    sizes = [
        sum(p.numel() for p in CpDiagonalExperts(D, OUT, num_experts=n, r=R, scaling=1.0).parameters())
        for n in (E, E + 1)
    ]
    assert sizes[1] - sizes[0] == R
