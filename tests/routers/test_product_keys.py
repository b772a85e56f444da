"""Scores of pairs: the formula, probabilities that are products, and few rows for many experts."""

from __future__ import annotations

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.routers import TopK
from moe_peft.routers.product_keys import ProductKeys
from moe_peft.types import TokenContext
from tests.compare import assert_same

from .made import D, T, rows

E1, E2 = 2, 3


def made(num_experts=E1 * E2, **settings):
    torch.manual_seed(0)
    router = ProductKeys(D, num_experts, select=TopK(top_k=2), **settings).double()
    return router, torch.randn(T, D, dtype=torch.float64, requires_grad=True)


def test_equals_the_formula_and_probabilities_of_pairs_are_products():
    router, x = made()
    U, V = router.weight[:E1], router.weight[E1:]
    expected = [[(U[i] * x[t]).sum() + (V[j] * x[t]).sum() for i in range(E1) for j in range(E2)] for t in range(T)]
    found = router(x, TokenContext())
    assert_same(found.logits, rows(expected), [x, router.weight], [x, router.weight], 1e-10)
    products = (x @ U.T).softmax(-1)[:, :, None] * (x @ V.T).softmax(-1)[:, None]
    torch.testing.assert_close(found.probs, products.flatten(1))


@pytest.mark.parametrize(("num_experts", "first", "count"), [(64, None, 16), (12, None, 7), (7, None, 8), (12, 2, 8)])
def test_rows_are_as_few_as_the_number_of_experts_allows(num_experts, first, count):
    assert made(num_experts, first_keys=first)[0].weight.shape == (count, D)


def test_a_number_that_does_not_divide_the_experts_is_refused():
    with pytest.raises(ValueError, match="first_keys=3 must divide num_experts=8"):
        RoutedConfig(scorer="product_keys", num_experts=8, router_args={"first_keys": 3})
    with pytest.raises(ValueError, match="needs no extra_scores"):
        RoutedConfig(scorer="product_keys", router="threshold")
