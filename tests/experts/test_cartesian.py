"""Experts that are pairs of halves: what each adds, how few matrices there are, and numbers that are refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.experts.cartesian import CartesianExperts
from tests.tiny import OneLinear

from .bank import OUT, D, E, R, assert_adds, assert_merges, made


@pytest.mark.parametrize("num_down", [None, 1, 4])
def test_adds_the_weighed_sum_of_its_pairs(num_down):
    bank, x, base = made(CartesianExperts, num_down=num_down)
    second = len(bank.B)
    assert_adds(bank, x, base, lambda e: bank.B[e % second].T @ bank.A[e // second])


def test_merges_under_constant_weights():
    assert_merges("cartesian")


def test_matrices_are_as_few_as_the_number_of_experts_allows():
    bank = CartesianExperts(D, OUT, num_experts=64, r=R, scaling=1.0)
    assert bank.A.shape == (8, R, D) and bank.B.shape == (8, R, OUT) and bank.num_choices == 64
    assert CartesianExperts(D, OUT, num_experts=12, r=R, scaling=1.0, num_down=6).B.shape[0] == 2


def test_products_and_means_are_those_of_the_matrices_of_pairs():
    bank, _, _ = made(CartesianExperts)
    alone = [bank.delta_weight(torch.eye(E)[e]).flatten() for e in range(E)]
    torch.testing.assert_close(bank.delta_products(), torch.stack(alone) @ torch.stack(alone).T)
    A, B = bank.mean_factors(torch.full((E,), 0.5))
    torch.testing.assert_close(A, bank.A.mean(0))
    torch.testing.assert_close(B, 1.7 * 2 * bank.B.mean(0).T)


def test_a_number_that_does_not_divide_the_experts_is_refused_and_files_say_theirs():
    with pytest.raises(ValueError, match="num_down=3 must divide num_experts=8"):
        RoutedConfig(experts="cartesian", num_experts=8, experts_args={"num_down": 3})
    config = RoutedConfig(
        experts="cartesian", num_experts=8, r=2, target_modules=["linear"], experts_args={"num_down": 4}
    )
    (layer,) = routed_layers(get_peft_model(OneLinear(3, 5), config))
    bank = layer.experts["default"]
    assert (len(bank.A), len(bank.B)) == (4, 2)
    shapes = CartesianExperts.saved_shapes(8, 2, {"num_down": 4})
    assert shapes == {"A": (4, 2), "B": (2, 2)}
