"""The linear scorer: rows for the selector's further columns, and a weight that other parts may take along."""

from __future__ import annotations

import torch

from moe_peft.routers import Dense, LinearRouter
from moe_peft.types import TokenContext


class WithColumn(Dense):
    extra_scores = 1


def test_a_selector_that_asks_for_columns_gets_rows_of_the_weight():
    router = LinearRouter(7, 4, select=WithColumn())
    x = torch.randn(3, 7)
    assert router.weight.shape == (5, 7) and router.scores(x, TokenContext()).shape == (3, 5)
    torch.testing.assert_close(router(x, TokenContext()).probs, (x @ router.weight.T)[:, :4].softmax(-1))


def test_noise_is_no_product_with_the_input_so_nothing_is_lent():
    router = LinearRouter(7, 4, select=Dense(), router_jitter_noise=0.1)
    assert router.shared_rows(TokenContext()) is router.weight
    assert router.shared_rows(TokenContext(training=True)) is None
