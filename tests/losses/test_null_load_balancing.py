"""Balance with null experts: the definition over all columns, with the nulls' shares evened out."""

from __future__ import annotations

import pytest
import torch

from moe_peft import RoutedConfig
from moe_peft.losses.null_load_balancing import NullLoadBalancing
from moe_peft.routers import LinearRouter
from moe_peft.routers.null_top_k import NullTopK
from moe_peft.types import TokenContext
from tests.compare import assert_same

D, E, T = 7, 4, 13


def decided(num_null=2, **context):
    torch.manual_seed(0)
    made = LinearRouter(D, E, select=NullTopK(top_k=3, num_null=num_null)).double()
    x = torch.randn(T, D, dtype=torch.float64)
    return made, x, made(x, TokenContext(**context))


@pytest.mark.parametrize("num_null", [1, 2, 5])
def test_equals_the_definition_over_valid_tokens(num_null):
    valid = torch.arange(T) % 4 != 1
    made, x, routing = decided(num_null, valid=valid)
    probs = (x @ made.weight.T).softmax(-1)[valid]
    columns, n = E + num_null, len(probs)
    shares = [sum(float(j in row) for row in probs.topk(3).indices.tolist()) / (3 * n) for j in range(columns)]
    shares[E:] = [sum(shares[E:]) / num_null] * num_null
    expected = columns * sum(shares[j] * probs[:, j].mean() for j in range(columns))
    assert_same(NullLoadBalancing()(routing), expected, [made.weight], [made.weight])


def test_batches_join():
    made, x, routing = decided()
    parts = [NullLoadBalancing().sums(made(own, TokenContext())) for own in (x[:5], x[5:])]
    torch.testing.assert_close(NullLoadBalancing.value(sum(parts)), NullLoadBalancing()(routing))


def test_balance_costs_one():
    sums = torch.tensor([3.0, 3.0, 1 / 5 * 10, 1 / 5 * 10, 9.0, 3 / 5 * 10, 10.0, 30.0]).double()
    assert NullLoadBalancing.value(sums).item() == pytest.approx(1.0)


def test_a_router_without_nulls_is_refused():
    with pytest.raises(ValueError, match="without 'null_load_balancing' for the top_k router, which gives no null_pr"):
        RoutedConfig(losses={"null_load_balancing": 0.1})
    RoutedConfig(router="null_top_k", losses={"null_load_balancing": 0.1}, router_aux_loss_coef=0.0)
