"""Changes the coefficient of a router loss in the course of training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..config.ranges import LARGEST
from ..layers import routed_layers
from ..losses import LOSSES
from ..messages import shown
from .adaptive import AdaptiveCoefficients
from .checks import is_count, is_number
from .training_run import RestoringCallback


class CoefficientSchedule(RestoringCallback):
    """Multiplies the configured coefficient of a router loss by a factor that is piecewise linear in the step.

    The factor depends on the step alone, so a resumed run continues where it was.

    Args:
        loss: Name of the loss, as in the logs: "load_balancing", "z_loss", ...
        points: Optimizer step -> factor; constant before the first and after the last.

    Raises:
        ValueError: There is no point, a step is no whole number or negative, or a factor negative or not finite.
    """

    def __init__(self, loss: str, points: Mapping[int, float]) -> None:
        if not isinstance(loss, str) or not loss:
            raise ValueError(
                f"CoefficientSchedule: loss={shown(loss)} must be a loss's name, as {shown(min(LOSSES))}."
            )
        if not _maps_steps_to_factors(points):
            raise ValueError(
                f"CoefficientSchedule: points={shown(points)} must map optimizer steps to factors, whole numbers to "
                "finite ones, neither negative, as {0: 1.0, 1000: 0.1}."
            )
        self.loss = loss
        self.points = sorted((int(step), float(factor)) for step, factor in points.items())
        self._configured: list[tuple[dict[str, float], float]] = []

    def factor(self, step: int) -> float:
        """Factor of the coefficient in an optimizer step."""
        return between(self.points, step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the configured coefficients.

        Raises:
            ValueError: No adapter of the model has the loss, or it changes its coefficient itself.
        """
        self.restore()
        objectives = list(_coefficients(kwargs["model"]))
        if any(key.endswith(f"/{self.loss}") for key in AdaptiveCoefficients.of(kwargs["model"]).get()):
            raise ValueError(
                f"CoefficientSchedule: the loss {shown(self.loss)} changes its own coefficient after every step, "
                "which a schedule would undo. Remove the callback."
            )
        self._configured = [(own, own[self.loss]) for own in objectives if self.loss in own]
        if not self._configured:
            names = sorted({name for own in objectives for name in own})
            raise ValueError(
                f"CoefficientSchedule: the model has no loss {shown(self.loss)}; it has {shown(names)}. A loss whose "
                "configured coefficient is 0 is left out: configure it with its largest value."
            )
        largest = max(factor for _, factor in self.points) * max(own for _, own in self._configured)
        if not largest <= LARGEST:
            self._configured = []
            raise ValueError(
                f"CoefficientSchedule: the coefficient of {shown(self.loss)} would reach {largest:g} by its points, "
                f"and must stay at {LARGEST:g} or below. Take smaller factors."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the coefficients of the step that begins."""
        for coefficients, configured in self._configured:
            coefficients[self.loss] = configured * self.factor(state.global_step)

    def restore(self) -> None:
        """Restore the configured coefficients."""
        for coefficients, configured in self._configured:
            coefficients[self.loss] = configured
        self._configured = []


def between(points: Sequence[tuple[int, float]], step: int) -> float:
    """The value at a step of a line through points, constant before the first and after the last.

    Args:
        points: (step, value), sorted by step.
        step: Of the optimizer.
    """
    after = bisect_right([own for own, _ in points], step)
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[after - 1], points[after]
    return low + (high - low) * (step - left) / (right - left)


def _coefficients(model: nn.Module) -> Iterator[dict[str, float]]:
    """The coefficients of every layer's losses, which a forward reads."""
    for layer in routed_layers(model):
        for objective in layer.objectives.values():
            yield objective.coefficients


def _maps_steps_to_factors(points: Any) -> bool:
    if not isinstance(points, Mapping) or not points:
        return False
    return all(is_count(step) and is_number(factor) and factor >= 0 for step, factor in points.items())
