"""Routing by a hash of ids: one expert for a token wherever it stands, evenly spread, and words about missing ids."""

from __future__ import annotations

import pytest
import torch

from moe_peft.routers import Dense
from moe_peft.routers.token_hash import TokenHash, hash_of
from moe_peft.types import TokenContext

from .made import D, E, T


def test_a_token_has_the_one_expert_of_its_id_with_weight_one():
    ids = torch.tensor([5, 9, 5, 0, 151_000, 9, 7, 8, 1, 2, 3, 4, 5])
    weights = TokenHash(D, E, select=Dense())(torch.randn(T, D), TokenContext(token_ids=ids)).weights
    expected = torch.zeros(T, E)
    for t, own in enumerate(ids.tolist()):
        mixed = (own + 1) * 2654435761 % 2**32
        expected[t, ((mixed ^ mixed >> 15) * 668265263 % 2**32 >> 12) % E] = 1
    assert torch.equal(weights, expected) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("num_values", [2, 8, 13])
def test_ids_are_spread_evenly_and_seeds_differ(num_values):
    ids = torch.arange(20_000)
    found = [hash_of(ids, seed, num_values) for seed in (0, 1)]
    for own in found:
        share = own.bincount(minlength=num_values) * num_values / len(ids)
        assert share.min() > 0.9 and share.max() < 1.1
    assert abs((found[0] == found[1]).float().mean().item() - 1 / num_values) < 0.05


def test_no_ids_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"TokenHash decides by the tokens' ids.*give the model input_ids"):
        TokenHash(D, E, select=Dense())(torch.randn(T, D), TokenContext())
