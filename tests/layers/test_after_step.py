"""After each optimizer step parts learn what was decided: once per decision, in training alone, of all layers."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, after_step
from moe_peft.forward.tracker import find_tracker
from moe_peft.layers import RoutedLayer
from moe_peft.losses import LOSSES
from moe_peft.telemetry.functions import record
from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.types import RouterLoss
from tests.tiny import padded_batch, tiny_llama


class Following(RouterLoss):
    """A loss whose coefficient doubles while an expert is asked for by more than its share."""

    adapts = True

    def __init__(self):
        self.seen = []

    def sums(self, routing):
        return LOSSES["z_loss"]().sums(routing)

    @staticmethod
    def value(sums):
        return sums[..., 0] / sums[..., 1]

    def adapt(self, coefficient, statistics):
        self.seen.append(list(statistics))
        return coefficient * 2


def counting(reentrant=None):
    """A model whose selectors keep what they are told."""
    torch.manual_seed(0)
    config = RoutedConfig(num_experts=4, top_k=2, r=2, target_modules=["up_proj", "q_proj"], init_weights=False)
    model = get_peft_model(tiny_llama(), config).train()
    told = {}
    for layer in (m for m in model.modules() if isinstance(m, RoutedLayer)):
        select = layer.router["default"].select
        select.counts = True
        select.after_step = lambda statistics, place=layer.place: told.setdefault(place, []).append(statistics)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model, told


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_selectors_are_told_every_training_decision_once(reentrant):
    model, told = counting(reentrant)
    batches = [padded_batch([3, 5]), padded_batch([6, 2], seed=2)]
    with record(model) as routings:
        for batch in batches:
            model.zero_grad()
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    with torch.no_grad():
        model(**batches[0])
    model.eval()(**batches[0])
    after_step(model)
    assert set(told) == set(routings) and len(told) == 4
    for place, (statistics,) in told.items():
        expected = [RoutingStatistics.of(routing) for routing in routings[place] if routing.context.training]
        assert len(expected) == 2 and statistics.tokens == 16
        torch.testing.assert_close(statistics.requests, sum(one.requests for one in expected))
        torch.testing.assert_close(statistics.mass, sum(one.mass for one in expected))
    after_step(model)
    assert all(len(made) == 1 for made in told.values())


def test_nothing_is_counted_where_no_part_asks():
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=4, top_k=2, r=2)).train()
    model(**padded_batch([3, 5]))
    assert not find_tracker(model).counted
    after_step(model)


def test_a_loss_that_adapts_gets_one_coefficient_for_all_its_places():
    model, _ = counting()
    loss = Following()
    for layer in (m for m in model.modules() if isinstance(m, RoutedLayer)):
        if layer.place.endswith("up_proj"):
            objective = layer.objectives["default"]
            objective.losses["following"], objective.coefficients["following"] = loss, 0.25
    model(**padded_batch([3, 5]))
    after_step(model)
    assert [len(seen) for seen in loss.seen] == [2]
    found = [m.objectives["default"].coefficients for m in model.modules() if isinstance(m, RoutedLayer)]
    assert [made["following"] for made in found if "following" in made] == [0.5, 0.5]


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        after_step(None)
