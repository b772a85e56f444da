"""L1 on ReLU gates: the formula, and a weight that finds the wanted number of active experts and never winds up."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, after_step, routed_layers
from moe_peft.losses.active_l1 import ActiveL1
from moe_peft.routers import LinearRouter
from moe_peft.routers.positive import Positive
from moe_peft.routers.relu import Relu
from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.tiny import padded_batch, tiny_llama

D, E, T = 7, 4, 13


def decided(num_tokens=T, seed=0, num_experts=E, **context):
    torch.manual_seed(seed)
    made = LinearRouter(D, num_experts, select=Positive(), gate=Relu()).double()
    x = torch.randn(num_tokens, D, dtype=torch.float64)
    return made, x, made(x, TokenContext(**context))


@pytest.mark.parametrize("active", [1, 1.5])
def test_equals_the_formula_over_valid_tokens(active):
    valid = torch.arange(T) % 4 != 1
    made, x, routing = decided(valid=valid)
    z, n = (x @ made.weight.T)[valid], int(valid.sum())
    expected = sum(E / (active * n) * (z[:, e] > 0).sum().item() * z[:, e].clamp(min=0).mean() for e in range(E))
    assert_same(ActiveL1(active=active)(routing), expected, [made.weight], [made.weight])


def test_batches_join():
    made, x, routing = decided()
    parts = [ActiveL1().sums(made(own, TokenContext())) for own in (x[:5], x[5:])]
    torch.testing.assert_close(ActiveL1.value(sum(parts)), ActiveL1()(routing))


@pytest.mark.parametrize(("active", "factor"), [(0.1, 1.2), (3.9, 1 / 1.2)])
def test_the_weight_grows_while_more_experts_are_active_than_wanted(active, factor):
    statistics = [RoutingStatistics.of(decided()[2])] * 2
    assert ActiveL1(active=active).adapt(0.5, statistics) == pytest.approx(0.5 * factor)


def test_the_weight_stays_in_reach_however_long_it_is_driven():
    statistics, low, high = [RoutingStatistics.of(decided()[2])], 1e-8, 1e-8
    for _ in range(300):
        low, high = ActiveL1(active=3.9).adapt(low, statistics), ActiveL1(active=0.1).adapt(high, statistics)
    assert low == 1e-8 and high == 1.0
    assert ActiveL1(active=3.9).adapt(1e-10, statistics) == 1e-10 and ActiveL1(active=0.1).adapt(5.0, statistics) == 5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_reaches_the_wanted_number_of_active_experts(seed):
    made, x, _ = decided(256, seed, num_experts=8)
    x[:, 0] = 1.0  # without a common direction half of the scores are positive whatever the matrix
    routing = made(x, TokenContext())
    loss, weight = ActiveL1(active=2), 1e-8
    assert routing.request_matrix().sum(-1).mean() > 3
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    target = torch.randn(D, 8, generator=torch.Generator().manual_seed(seed)).double()
    counts = []
    for _ in range(300):
        optimizer.zero_grad()
        routing = made(x, TokenContext(training=True))
        task = (routing.weights - (x @ target).relu()).square().mean()
        (task + weight * loss(routing)).backward()
        optimizer.step()
        weight = loss.adapt(weight, [RoutingStatistics.of(routing)])
        counts.append(routing.request_matrix().sum(-1).mean().item())
    assert sum(counts[-100:]) / 100 == pytest.approx(2, abs=0.3)


def test_more_than_half_of_the_experts_cannot_be_reached_and_is_refused():
    fields = {"router": "positive", "gate": "relu", "router_aux_loss_coef": 0.0, "num_experts": 4}
    with pytest.raises(ValueError, match=r"losses\['active_l1'\]: active=3 must be at most num_experts / 2 = 2"):
        RoutedConfig(**fields, losses={"active_l1": {"weight": 1e-8, "active": 3}})
    RoutedConfig(**fields, losses={"active_l1": {"weight": 1e-8, "active": 2}})


def test_after_a_step_every_place_has_the_adapted_weight():
    losses = {"active_l1": 0.5}
    config = RoutedConfig(router="positive", gate="relu", router_aux_loss_coef=0.0, losses=losses, num_experts=E)
    model = get_peft_model(tiny_llama(), config).train()
    batch = padded_batch([5, 3])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    after_step(model)
    weights = {layer.objectives["default"].coefficients["active_l1"] for layer in routed_layers(model)}
    assert len(weights) == 1 and weights <= {0.5 * 1.2, 0.5 / 1.2}
