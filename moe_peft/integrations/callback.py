"""Keeps routed adapters right inside a trainer: weight of the router losses, and float32 routers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..context import find_tracker
from ..routers import Router


class MoeCallback(TrainerCallback):
    """Callback for any transformers or TRL trainer of a model with routed adapters.

    Router losses are injected with the weight `amp_scale / micro-batches of the accumulation window`, whatever way the
    trainer scales its own loss; never times the number of processes, over which gradients are averaged. Routers that a
    trainer turned to 16 bit are float32 again before the first step.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the routers' precision before the optimizer has any state."""
        restore_router_precision(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weigh the router losses of the accumulation window that begins."""
        tracker = find_tracker(kwargs["model"])
        if tracker is not None:
            micro_batches = _micro_batches(args, state, kwargs.get("train_dataloader"))
            tracker.loss_scale = _amp_scale(kwargs.get("optimizer")) / micro_batches

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as a plain loop expects it."""
        tracker = find_tracker(kwargs["model"])
        if tracker is not None:
            tracker.loss_scale = 1.0


def restore_router_precision(model: nn.Module) -> int:
    """Turn trainable routers that were cast to 16 bit back to float32.

    Args:
        model: A model with routed adapters.

    Returns:
        Number of routers that were cast.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Router) and module.weight.dtype in (torch.bfloat16, torch.float16):
            module.weight.data = module.weight.data.float()
            count += 1
    return count


def _micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Micro-batches of the window that begins; the last window of an epoch may be shorter."""
    window = args.gradient_accumulation_steps
    try:
        length = len(dataloader)
    except TypeError:
        return window
    windows = math.ceil(length / window)
    is_last = windows > 0 and state.global_step % windows == windows - 1
    return (length % window or window) if is_last else window


def _amp_scale(optimizer: Any) -> float:
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
