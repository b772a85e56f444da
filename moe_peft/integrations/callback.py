"""Keeps routed adapters right inside a trainer, and measures their routing for the trainer's logs."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..forward.find import find_trackers
from ..forward.joined_losses import WindowSums
from ..forward.tracker import ForwardTracker
from ..layers import routed_layers
from ..layers.after_step import after_step
from ..layers.router_norms import router_norms
from ..telemetry.history import FILE_NAME, RoutingHistory
from ..telemetry.meter import RoutingMeter, metrics_of
from .adaptive import AdaptiveCoefficients
from .checks import check_count, check_training
from .precision import restore_precision, uses_deepspeed
from .resuming import checkpoint_folder
from .training_run import RestoringCallback, load_best, running_trainer


class MoeCallback(RestoringCallback, ExportableState):
    """Callback for any transformers or TRL trainer of a model with routed adapters.

    Router losses are injected with the weight `amp_scale / micro-batches of the accumulation window`, whatever way the
    trainer scales its own loss; never times the number of processes, over which gradients are averaged. Routers that a
    trainer turned to 16 bit are float32 again before the first step. The routing is measured in training passes; its
    history is saved beside every checkpoint. After every optimizer step that was not skipped the parts that learn from
    the decisions do (`moe_peft.after_step`); coefficients that adapt are saved in the trainer's state and resumed from
    it. `moe_peft.attach(trainer)` adds this callback and puts what it measures
    into the trainer's logs, which a callback alone cannot.

    Args:
        telemetry_steps: Measure in every n-th optimizer step; 0 switches telemetry off, and the history then holds
            the lengths of the routers' vectors before training alone.
        layer_groups: Groups of consecutive layers that get log entries of their own; 0 for none.

    Raises:
        ValueError: A number is negative.
    """

    def __init__(self, telemetry_steps: int = 1, layer_groups: int = 4) -> None:
        for name, value in (("telemetry_steps", telemetry_steps), ("layer_groups", layer_groups)):
            check_count("MoeCallback", name, value)
        self.telemetry_steps = telemetry_steps
        self.layer_groups = layer_groups
        self.meter = RoutingMeter()
        self.history = RoutingHistory()
        self.coefficients: dict[str, float] | None = None
        self._adaptive = AdaptiveCoefficients()
        self._trackers: list[ForwardTracker] = []
        self._measuring = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what training would make impossible, and restore the routers' precision before the first step."""
        check_training(args, kwargs["model"])
        if not uses_deepspeed(args):
            restore_precision(kwargs["model"])
        given = self.coefficients
        self.restore()
        self._trackers = find_trackers(kwargs["model"])
        for tracker in self._trackers:
            # Those of a run that was interrupted, of which nobody told.
            tracker.training_observers = [o for o in tracker.training_observers if not _measures(o)]
        self._adaptive = AdaptiveCoefficients.of(kwargs["model"])
        self._adaptive.set(given or self._saved_coefficients(state))
        self.history = _resumed_history(args, state) if state.global_step > 0 else RoutingHistory()
        if state.global_step == 0:
            self.history.initial_norms = _router_norms(kwargs["model"])
        self.meter = RoutingMeter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weigh the router losses of the accumulation window that begins."""
        if self.count_micro_batches is not None:
            micro_batches = self.count_micro_batches()
        else:
            micro_batches = _micro_batches(args, state, kwargs.get("train_dataloader"))
        scale = _amp_scale(kwargs.get("optimizer")) / max(micro_batches, 1)
        # A loop of one's own may begin with a step.
        self._trackers = self._trackers or find_trackers(kwargs["model"])
        for tracker in self._trackers:
            tracker.loss_scale, tracker.window, tracker.managed = scale, WindowSums(), True
            tracker.in_charge = self._while_training()
        self._measure(self.telemetry_steps > 0 and state.global_step % self.telemetry_steps == 0)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the router losses of a micro-batch."""
        if self._measuring:
            self.meter.add_losses(*self._trackers)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the router losses of the window's last micro-batch; outside a window the model is a plain loop's."""
        self.on_substep_end(args, state, control, **kwargs)
        self._leave_window()
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
        folder = checkpoint_folder(args, state)
        if state.is_world_process_zero and not self.history.is_empty:
            folder.mkdir(parents=True, exist_ok=True)
            self.history.save(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as a plain loop expects it, load the best weights, and save the history of the run."""
        super().on_train_end(args, state, control, **kwargs)
        load_best(args, state, kwargs["model"])
        folder = Path(args.output_dir or "")
        if state.is_world_process_zero and not self.history.is_empty and folder.is_dir():
            self.history.save(folder)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let parts change by what was decided since the last step; one that a scaler skipped leaves no trace."""
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self._forget_decisions()
        else:
            after_step(kwargs["model"])

    def state(self) -> dict[str, Any]:
        """What a trainer saves with its state: the arguments, and the coefficients that have adapted."""
        return {
            "args": {"telemetry_steps": int(self.telemetry_steps), "layer_groups": int(self.layer_groups)},
            "attributes": {"coefficients": self._adaptive.get()},
        }

    def restore(self) -> None:
        """Leave the model to a plain loop: configured coefficients, losses of weight one, and nobody who measures."""
        self._leave_window()
        self._forget_decisions()
        self._adaptive.restore()
        self.coefficients = None

    def _saved_coefficients(self, state: TrainerState) -> dict[str, float]:
        """Those that a checkpoint's state holds; it may hold several callbacks of one name."""
        # Annotated as a list of callbacks; it holds what they saved, by the name of their class.
        everything: Any = state.stateful_callbacks
        saved = everything.get(type(self).__name__, {}) if state.global_step > 0 else {}
        saved = saved[0] if isinstance(saved, list) else saved
        return saved.get("attributes", {}).get("coefficients") or {}

    def _forget_decisions(self) -> None:
        for tracker in self._trackers:
            tracker.counted = {}

    def _leave_window(self) -> None:
        """Weigh the router losses of forwards to come with one, as a plain loop expects, and measure none of them."""
        self._measure(False)
        for tracker in self._trackers:
            tracker.loss_scale, tracker.window, tracker.managed, tracker.in_charge = 1.0, None, False, None

    def _while_training(self) -> Callable[[], None] | None:
        """What ends the window before a forward that is no part of training; None in a loop of one's own.

        Nobody tells a callback that an exception has ended training.
        """
        trainer, thread = running_trainer(), threading.get_ident()
        if trainer is None:
            return None
        known = weakref.ref(trainer)
        changing = [own for own in trainer.callback_handler.callbacks if isinstance(own, RestoringCallback)]

        def check() -> None:
            if threading.get_ident() == thread and running_trainer() is not known():
                for callback in changing:
                    callback.restore()

        return check

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

    def _measure(self, measuring: bool) -> None:
        for tracker in self._trackers:
            tracker.training_observers = [o for o in tracker.training_observers if o != self.meter.observe]
            if measuring:
                tracker.training_observers.append(self.meter.observe)
        self._measuring = measuring


def _resumed_history(args: TrainingArguments, state: TrainerState) -> RoutingHistory:
    """History of the checkpoint that training resumes from, which may lie in another run's folder."""
    for folder in (args.resume_from_checkpoint, checkpoint_folder(args, state)):
        if isinstance(folder, (str, Path)) and (Path(folder) / FILE_NAME).is_file():
            return RoutingHistory.load(folder)
    return RoutingHistory()


def _router_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """By place and adapter the lengths that tools compare with those after training."""
    names = {name for layer in routed_layers(model) for name in layer.active_adapters if name in layer.experts}
    return {f"{place}/{name}": own for name in sorted(names) for place, own in router_norms(model, name).items()}


def _micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Micro-batches of the window that begins, where no trainer tells; an epoch's last window may be shorter."""
    window = args.gradient_accumulation_steps
    try:
        length = len(dataloader)
    except TypeError:
        return window
    windows = math.ceil(length / window)
    is_last = windows > 0 and state.global_step % windows == windows - 1
    return (length % window or window) if is_last else window


def _measures(observer: Callable[..., None]) -> bool:
    return isinstance(getattr(observer, "__self__", None), RoutingMeter)


def _amp_scale(optimizer: Any) -> float:
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
