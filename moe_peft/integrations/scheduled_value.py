"""Changes a number of an adapter's parts in the course of training: top_k, a temperature, a dropout, a capacity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..config.config import MoeConfig
from ..layers import routed_layers
from ..messages import shown
from ..part import Part
from .checks import is_count, is_number
from .schedules import between
from .training_run import RestoringCallback
from .values import get_value, known_values, parts_with, set_value, with_value, write_value


class ScheduledValue(RestoringCallback):
    """Sets a number of all parts that have it, piecewise linear in the step; whole numbers are rounded.

    The value depends on the step alone, so a resumed run continues where it was. A run that ends by itself leaves the
    value of its last step, in the adapter's configuration too, so that what is saved then computes with it; a run that
    an exception ends leaves the numbers it began with. Checkpoints on the way name the number that the run began with,
    as resuming asks for.

    Growing k over a fixed random router is SMoE-Dropout (arXiv 2303.01610): `ScheduledValue("top_k", {0: 1, 999: 8})`.

    Args:
        name: As "top_k", "capacity_factor", "expert_dropout", "router_jitter_noise", "lora_dropout", or an option as
            "tau" and "p".
        points: Optimizer step -> value; constant before the first and after the last.

    Raises:
        ValueError: The name is none, there is no point, or a step or value is no such number.
    """

    def __init__(self, name: str, points: Mapping[int, float]) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"ScheduledValue: name={shown(name)} must be a number's name, as 'top_k'.")
        if not _maps_steps_to_numbers(points):
            raise ValueError(
                f"ScheduledValue: points={shown(points)} must map optimizer steps, whole numbers that are not "
                "negative, to finite numbers, as {0: 1, 1000: 4}."
            )
        self.name = name
        self.points = sorted((int(step), float(value)) for step, value in points.items())
        self._before: list[tuple[Part, Any]] = []

    def value(self, step: int) -> float:
        """The value in an optimizer step, before it is rounded."""
        return between(self.points, step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the numbers of all parts.

        Raises:
            ValueError: No part has one of that name that may change, or it cannot have the values.
        """
        self.restore()
        model = kwargs["model"]
        parts = parts_with(model, self.name)
        if not parts:
            raise ValueError(
                f"ScheduledValue: the model has no number {shown(self.name)} that may change; it has "
                f"{shown(known_values(model))}."
            )
        numbers = [part for part in parts if is_number(get_value(part, self.name))]
        if len(numbers) < len(parts):
            raise ValueError(
                f"ScheduledValue: {self.name} of {type(parts[0]).__name__} is not set, so that there is nothing to "
                f"change. Configure it with its first value, {self.points[0][1]:g}."
            )
        for config in _configs(model, self.name):
            for _, value in self.points:
                with_value(config, self.name, self._as(get_value(parts[0], self.name), value))
        self._before = [(part, get_value(part, self.name)) for part in parts]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the numbers of the step that begins."""
        for part, before in self._before:
            set_value(part, self.name, self._as(before, self.value(state.global_step)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the last numbers, and write them into the configurations."""
        if self._before:
            last = get_value(self._before[0][0], self.name)
            for config in _configs(kwargs["model"], self.name):
                write_value(config, self.name, last)
        self._before = []

    def restore(self) -> None:
        """Restore the numbers that the run began with."""
        for part, before in self._before:
            set_value(part, self.name, before)
        self._before = []

    def _as(self, like: Any, value: float) -> float | int:
        return round(value) if isinstance(like, int) else value


def _configs(model: nn.Module, name: str) -> Iterator[MoeConfig]:
    """Configurations of the adapters that have the number."""
    adapters = {own for layer in routed_layers(model) for own in layer.experts}
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping):
            for own, config in configs.items():
                if own in adapters and isinstance(config, MoeConfig) and parts_with(model, name, own):
                    yield config
            return


def _maps_steps_to_numbers(points: Any) -> bool:
    if not isinstance(points, Mapping) or not points:
        return False
    return all(is_count(step) and is_number(value) for step, value in points.items())
