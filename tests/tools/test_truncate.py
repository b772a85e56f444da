"""Truncating a product by its factors is truncating the matrix."""

from __future__ import annotations

import pytest
import torch

from moe_peft.tools.truncate import cosine, truncated


@pytest.mark.parametrize(("rank", "total"), [(2, 5), (5, 5), (9, 5), (3, 12)])
def test_it_is_the_nearest_matrix_of_the_rank_and_says_what_is_lost(rank, total):
    A, B = torch.randn(total, 7, dtype=torch.float64), torch.randn(9, total, dtype=torch.float64)
    U, z, V = torch.linalg.svd(B @ A)
    k = min(rank, total, 7)
    nearest = (U[:, :k] * z[:k]) @ V[:k]
    found_A, found_B, lost = truncated(A, B, rank)
    assert found_A.shape == (k, 7) and found_B.shape == (9, k)
    torch.testing.assert_close(found_B @ found_A, nearest)
    expected = torch.linalg.norm(B @ A - nearest) / torch.linalg.norm(B @ A)
    assert lost == pytest.approx(float(expected), abs=1e-7)


def test_cosines_of_products_are_those_of_the_matrices_and_zero_has_none():
    one, other = ((torch.randn(r, 7), torch.randn(9, r)) for r in (2, 3))
    matrices = [(B @ A).double().flatten() for A, B in (one, other)]
    assert cosine(one, other) == pytest.approx(float(torch.cosine_similarity(*matrices, dim=0)), abs=1e-5)
    assert cosine(one, one) == pytest.approx(1) and cosine(one, (other[0], torch.zeros(9, 3))) == 0
    assert truncated(one[0], torch.zeros(9, 2), 1)[2] == 0


def test_the_cosine_of_huge_and_of_tiny_products_is_that_of_their_directions():
    first, second = torch.randn(2, 5), torch.randn(4, 2)
    expected = cosine((first, second), (first + 1, second))
    for size in (1e80, 1e-80):
        big = (first.double() * size, second.double())
        assert cosine(big, ((first.double() + 1) * size, second.double())) == pytest.approx(expected, abs=1e-6)
