"""Inner products by factors are those of the matrices."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts.products import pair_products


@pytest.mark.parametrize("shared", [False, True])
def test_products_by_factors_are_those_of_the_matrices(shared):
    torch.manual_seed(0)
    A = torch.randn(3, 5) if shared else torch.randn(4, 3, 5)
    B = torch.randn(4, 3, 6)
    deltas = [B[e].double().T @ (A if shared else A[e]).double() for e in range(4)]
    expected = torch.stack([torch.stack([(a * b).sum() for b in deltas]) for a in deltas])
    torch.testing.assert_close(pair_products(A, B), expected)
