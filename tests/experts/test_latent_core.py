"""Experts that differ by a core: what each adds, and a start at nearly one core."""

from __future__ import annotations

import torch

from moe_peft.experts.latent_core import LatentCoreExperts

from .bank import R, assert_adds, assert_merges, made


def test_adds_the_weighed_sum_of_its_matrices():
    bank, x, base = made(LatentCoreExperts)
    bank.C.data = torch.randn_like(bank.C)
    assert_adds(bank, x, base, lambda e: bank.B.T @ bank.C[e] @ bank.A)


def test_merges_under_constant_weights():
    assert_merges("latent_core")


def test_cores_start_near_the_identity_and_apart():
    bank, _, _ = made(LatentCoreExperts, init_weights=True)
    assert (bank.C - torch.eye(R)).abs().max() < 0.1 and not torch.equal(bank.C[0], bank.C[1]) and not bank.B.any()
