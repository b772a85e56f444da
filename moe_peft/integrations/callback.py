"""Keeps routed adapters right inside a trainer, and measures their routing for the trainer's logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..experts import VectorExperts
from ..forward.joined_losses import WindowSums
from ..forward.tracker import ForwardTracker, find_tracker
from ..layers import SlicedExperts
from ..routers import LinearRouter
from ..telemetry.history import FILE_NAME, RoutingHistory
from ..telemetry.meter import RoutingMeter, metrics_of
from .checks import check_training, has_four_bit_experts


class MoeCallback(TrainerCallback):
    """Callback for any transformers or TRL trainer of a model with routed adapters.

    Router losses are injected with the weight `amp_scale / micro-batches of the accumulation window`, whatever way the
    trainer scales its own loss; never times the number of processes, over which gradients are averaged. Routers that a
    trainer turned to 16 bit are float32 again before the first step. The routing is measured in training passes; its
    history is saved beside every checkpoint. `moe_peft.attach(trainer)` adds this callback and puts what it measures
    into the trainer's logs, which a callback alone cannot.

    Args:
        telemetry_steps: Measure in every n-th optimizer step; 0 switches telemetry off.
        layer_groups: Groups of consecutive layers that get log entries of their own; 0 for none.

    Raises:
        ValueError: A number is negative.
    """

    def __init__(self, telemetry_steps: int = 1, layer_groups: int = 4) -> None:
        for name, value in (("telemetry_steps", telemetry_steps), ("layer_groups", layer_groups)):
            if value < 0:
                raise ValueError(f"MoeCallback: {name}={value} must be 0 (off) or a positive number.")
        self.telemetry_steps = telemetry_steps
        self.layer_groups = layer_groups
        self.meter = RoutingMeter()
        self.history = RoutingHistory()
        self._measuring = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what training would make impossible, and restore the routers' precision before the first step."""
        check_training(args, kwargs["model"])
        if not uses_deepspeed(args):
            restore_precision(kwargs["model"])
        tracker = find_tracker(kwargs["model"])
        if tracker is not None:
            self._measure(tracker, False)
        self.history = _resumed_history(args, state) if state.global_step > 0 else RoutingHistory()
        self.meter = RoutingMeter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weigh the router losses of the accumulation window that begins."""
        tracker = find_tracker(kwargs["model"])
        if tracker is None:
            return
        micro_batches = _micro_batches(args, state, kwargs.get("train_dataloader"))
        tracker.loss_scale = _amp_scale(kwargs.get("optimizer")) / micro_batches
        tracker.window, tracker.managed = WindowSums(), True
        self._measure(tracker, self.telemetry_steps > 0 and state.global_step % self.telemetry_steps == 0)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the router losses of a micro-batch."""
        tracker = find_tracker(kwargs["model"])
        if tracker is not None and self._measuring:
            self.meter.add_losses(tracker)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the router losses of the window's last micro-batch."""
        self.on_substep_end(args, state, control, **kwargs)
        if control.should_save:
            self.on_save(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the entry that was added, where a checkpoint of this step follows."""
        if control.should_save:
            self.on_save(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the routing history beside the checkpoint.

        Called before the trainer writes its checkpoint as well, which ends with the file that marks it as complete: a
        process that is killed in between would leave a complete checkpoint without a history.
        """
        folder = _checkpoint_folder(args, state)
        if state.is_world_process_zero and self.history.steps:
            folder.mkdir(parents=True, exist_ok=True)
            self.history.save(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as a plain loop expects it, and save the routing history of the run."""
        tracker = find_tracker(kwargs["model"])
        if tracker is not None:
            self._measure(tracker, False)
            tracker.loss_scale, tracker.window, tracker.managed = 1.0, None, False
        folder = Path(args.output_dir or "")
        if state.is_world_process_zero and self.history.steps and folder.is_dir():
            self.history.save(folder)

    def read_metrics(self, step: int) -> dict[str, float]:
        """Read the meter into log entries and the history; every process must call it.

        Args:
            step: Optimizer steps so far.

        Returns:
            Entries with keys "moe/..."; empty when nothing was measured since the last reading.
        """
        reading = self.meter.read()
        if not reading.places:
            return {}
        self.history.append(step, reading)
        return metrics_of(reading, self.layer_groups)

    def _measure(self, tracker: ForwardTracker, measuring: bool) -> None:
        tracker.training_observers = [o for o in tracker.training_observers if o != self.meter.observe]
        if measuring:
            tracker.training_observers.append(self.meter.observe)
        self._measuring = measuring


def restore_precision(model: nn.Module) -> int:
    """Turn parameters that were cast to 16 bit back to float32, where rounding would undo their training.

    Rounded scores of routers change which experts are selected. Vectors near one, and copies of the backbone's experts
    have no room in 16 bit for small steps; of copies those of 4-bit experts, which trainers cast, as peft keeps others
    in the precision that was asked for.

    Parameters that FSDP split over processes keep their dtype, which its mixed precision sets to float32. Do not call
    it on a model that DeepSpeed holds: it owns the storage, and keeps a float32 copy in its optimizer. Scores are
    computed in float32 from weights of any dtype.

    Args:
        model: A model with routed adapters.

    Returns:
        Number of parameters that were cast.
    """
    modules = [module for module in model.modules() if isinstance(module, (LinearRouter, VectorExperts))]
    for layer in (module for module in model.modules() if isinstance(module, SlicedExperts)):
        if has_four_bit_experts(layer.get_base_layer()):
            modules.extend(layer.experts.values())
    parameters = [parameter for module in modules for parameter in module.parameters()]
    rounded = [p for p in parameters if p.dtype in (torch.bfloat16, torch.float16) and not isinstance(p, DTensor)]
    for parameter in rounded:
        parameter.data = parameter.data.float()
    return len(rounded)


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Whether DeepSpeed holds the weights of the model that is trained."""
    state = args.distributed_state
    return state is not None and state.distributed_type == DistributedType.DEEPSPEED


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or "") / f"checkpoint-{state.global_step}"


def _resumed_history(args: TrainingArguments, state: TrainerState) -> RoutingHistory:
    """History of the checkpoint that training resumes from, which may lie in another run's folder."""
    for folder in (args.resume_from_checkpoint, _checkpoint_folder(args, state)):
        if isinstance(folder, (str, Path)) and (Path(folder) / FILE_NAME).is_file():
            return RoutingHistory.load(folder)
    return RoutingHistory()


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
