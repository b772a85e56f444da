"""Pairs that are filled up to one rank add what they added before."""

from __future__ import annotations

import torch

from moe_peft.tools.one_rank import of_one_rank


def test_every_pair_has_the_largest_rank_and_the_product_that_it_had():
    torch.manual_seed(0)
    pairs = {f"place{rank}": (torch.randn(rank, 5), torch.randn(4, rank)) for rank in (3, 1, 2)}
    rank, filled = of_one_rank(pairs)
    assert rank == 3 and filled.keys() == pairs.keys()
    for name, (A, B) in filled.items():
        assert A.shape == (3, 5) and B.shape == (4, 3)
        torch.testing.assert_close(B @ A, pairs[name][1] @ pairs[name][0])
    assert all(torch.equal(own, filled["place3"][n]) for n, own in enumerate(pairs["place3"]))
