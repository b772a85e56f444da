"""Freezes routers or experts for a range of steps: experts frozen at the start is a warm-up of the routers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..layers import routed_layers
from ..messages import shown
from .checks import is_count

PARTS = ("router", "experts")


class FreezeCallback(TrainerCallback):
    """Keeps one part of all routed adapters as it is for the optimizer steps `first_step` to `last_step - 1`.

    The gradients are dropped before the optimizer's step, so that it leaves the parameters alone, weight decay
    included, and their state does not advance. Parameters stay trainable: distributed wrappers and TRL's reference
    adapters rely on that, and gradients of the part still count in the norm that is clipped.

    Args:
        part: "router" or "experts".
        first_step: First frozen optimizer step, counted from 0.
        last_step: First step that trains again.

    Raises:
        ValueError: There is no such part, or no step lies between the two.
    """

    def __init__(self, part: str, first_step: int = 0, last_step: int = 100) -> None:
        if not isinstance(part, str) or part not in PARTS:
            raise ValueError(f"FreezeCallback: part={shown(part)} must be one of {', '.join(map(shown, PARTS))}.")
        if not (is_count(first_step) and is_count(last_step) and first_step < last_step):
            raise ValueError(
                f"FreezeCallback: first_step={shown(first_step)} and last_step={shown(last_step)} enclose no step; "
                "the first must be a whole number, 0 or more, and the last a larger one."
            )
        self.part = part
        self.first_step = first_step
        self.last_step = last_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what would step without asking, and models without the part."""
        if args.distributed_state is not None and args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "FreezeCallback cannot hold back DeepSpeed, whose engine steps inside the backward pass. Train with "
                "DDP or FSDP2, or remove the callback."
            )
        if next(self._parameters(kwargs["model"]), None) is None:
            raise ValueError(f"FreezeCallback: no adapter of the model has a part {shown(self.part)} to freeze.")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the part's gradients in a frozen step."""
        if self.first_step <= state.global_step < self.last_step:
            for parameter in self._parameters(kwargs["model"]):
                parameter.grad = None

    def _parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        for layer in routed_layers(model):
            banks = layer.router if self.part == "router" else layer.experts
            for bank in banks.values():
                yield from bank.parameters()
