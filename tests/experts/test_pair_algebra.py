"""A bank of pairs knows its matrices without building them; a kind of its own claims no directions."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts import EXPERTS, LowRankExperts

E, S, D, OUT, R = 3, 1, 7, 5, 2


def bank(kind=LowRankExperts, **fields):
    torch.manual_seed(0)
    sizes = {"num_experts": E, "r": R, "init_weights": False, "shared": S}
    return kind(D, OUT, **sizes, **fields).double()


class Squared(LowRankExperts):
    def combine(self, h, base_out_TO, routing, *, in_place=False):
        return super().combine(h * h, base_out_TO, routing, in_place=in_place)


def test_sums_products_and_directions_are_those_of_the_matrices():
    own = bank(scaling=1.7)
    matrices = 1.7 * own.B.mT @ own.A
    weights = torch.linspace(0.2, 0.9, E).double()
    expected = torch.einsum("e,eod->od", weights, matrices[:E]) + matrices[E]
    torch.testing.assert_close(own.delta_weight(weights), expected)
    A, B = own.delta_factors(weights)
    torch.testing.assert_close(B @ A, expected)
    torch.testing.assert_close(own.delta_products(), torch.einsum("eod,fod->ef", matrices[:E], matrices[:E]))
    answered = torch.einsum("eod,ed->eo", matrices[:E], own.directions()).norm(dim=-1)
    torch.testing.assert_close(answered, torch.linalg.svdvals(matrices[:E])[:, 0])


def test_means_of_pairs_have_the_rank_of_one_pair_and_are_exact_where_one_matrix_is_shared():
    own = bank(scaling=0.5)
    with torch.no_grad():
        own.A[:E] = own.A[:1]
    weights = torch.tensor([0.5, 0.2, 0.3]).double()
    A, B = own.mean_factors(weights)
    assert A.shape == (R + S * R, D) and B.shape == (OUT, R + S * R)
    torch.testing.assert_close(B @ A, own.delta_weight(weights))


def test_rows_of_evened_out_activations_have_one_norm():
    own = bank(scaling=1.0)
    own.even_out()
    norms = own.A.norm(dim=-1)
    torch.testing.assert_close(norms, norms.mean().expand_as(norms))


@pytest.mark.parametrize("kind", [Squared, EXPERTS["normed"]])
def test_a_kind_that_combines_in_its_own_way_does_not_say_the_directions_of_its_pairs(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} does not know which direction"):
        bank(kind, scaling=1.0).directions()
