"""Schedules of coefficients: piecewise linear in the step, exact at zero, gone after training."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from moe_peft import CoefficientSchedule, routed_layers
from moe_peft.forward.tracker import find_tracker
from moe_peft.integrations import attach
from tests.integrations.test_callback import COEF, adapted
from tests.integrations.test_parameter_groups import trainer_of


class Coefficients(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        layers = find_tracker(model).latest.all_layers()
        self.seen.append({layer.coefficients["load_balancing"] for layer in layers})


@pytest.mark.parametrize(
    ("points", "factors"),
    [
        ({0: 1.0, 4: 0.0}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ({2: 2.0}, [2.0] * 6),
        ({3: 0.0, 1: 1.0}, [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]),
    ],
)
def test_factors_are_piecewise_linear_and_constant_outside(points, factors):
    schedule = CoefficientSchedule("load_balancing", points)
    assert [schedule.factor(step) for step in range(6)] == pytest.approx(factors)


def test_every_layer_trains_with_the_coefficient_of_the_step_and_ends_with_its_own(tmp_path):
    watch = Coefficients()
    trainer = attach(trainer_of(tmp_path, max_steps=3))
    trainer.add_callback(CoefficientSchedule("load_balancing", {0: 1.0, 2: 0.5}))
    trainer.add_callback(watch)
    trainer.train()
    assert watch.seen == [{COEF}, {0.75 * COEF}, {0.5 * COEF}]
    objectives = [m.objectives["default"] for m in trainer.model.modules() if hasattr(m, "objectives")]
    assert objectives and all(own.coefficients["load_balancing"] == COEF for own in objectives)


def test_factor_zero_trains_as_without_the_loss(tmp_path):
    off = attach(trainer_of(tmp_path, seed=1))
    off.add_callback(CoefficientSchedule("load_balancing", {0: 0.0}))
    off.train()
    never = attach(trainer_of(tmp_path, adapted(coef=0.0), seed=1))
    never.train()
    on = attach(trainer_of(tmp_path, seed=1))
    on.train()
    expected = dict(never.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in off.model.named_parameters())
    assert not all(torch.equal(p, expected[name]) for name, p in on.model.named_parameters())


def test_losses_that_the_model_lacks_are_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.add_callback(CoefficientSchedule("z_loss", {0: 1.0}))
    with pytest.raises(ValueError, match=r"the model has no loss 'z_loss'; it has \['load_balancing'\]"):
        trainer.train()


@pytest.mark.parametrize("points", [{}, {-1: 1.0}, {0: -0.5}])
def test_points_that_make_no_sense_are_refused(points):
    with pytest.raises(ValueError, match="must map optimizer steps to factors"):
        CoefficientSchedule("z_loss", points)


def test_a_coefficient_that_leaves_the_range_of_float32_is_refused_before_training():
    model = adapted(coef=0.5)
    before = [dict(own.coefficients) for layer in routed_layers(model) for own in layer.objectives.values()]
    schedule = CoefficientSchedule(next(iter(before[0])), {0: 1.0, 10: 1e300})
    with pytest.raises(ValueError, match=r"would reach 5e\+299 by its points"):
        schedule.on_train_begin(None, None, None, model=model)
    assert before == [dict(own.coefficients) for layer in routed_layers(model) for own in layer.objectives.values()]
