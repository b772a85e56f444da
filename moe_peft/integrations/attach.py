"""One call that prepares a trainer for routed adapters: the callback, and the sample groups where they are needed."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..forward.frozen import FrozenTensors
from .callback import MoeCallback
from .checks import check_adapter, check_count, check_sharded_dtypes, check_training
from .console import print_tables
from .groups import carry_groups, check_groups
from .noise import say_what_is_off
from .parameter_groups import Rates, check_rates, set_learning_rates
from .precision import restore_precision, uses_deepspeed
from .training_run import RunCallback, TrainingRun


def attach(
    trainer: Any,
    *,
    telemetry_steps: int = 1,
    layer_groups: int = 4,
    console_steps: int = 100,
    router_lr: float | None = None,
    expert_lr: float | None = None,
    lora_plus_ratio: float | None = None,
) -> Any:
    """Prepare a transformers or TRL trainer whose model has routed adapters. Call it before `trainer.train()`.

    Adds `MoeCallback`, and what it measures to the trainer's logs (keys "moe/..."). Routers that the trainer cast to
    16 bit are float32 again. A checkpoint resumes in the precision it was saved in, one of a run that is finished
    trains no further step, and the best checkpoint is found whatever the adapter is called. Whatever ends
    `trainer.train()`, Ctrl-C included, the model is left as a plain loop expects it. Where an adapter balances by
    sample group, its column is kept through `remove_unused_columns` and carried past the trainer's collator;
    evaluation goes without. Where the trainer compares passes of the model with each other (a reference, a ratio to
    its own past), dropout, jitter and capacity are off for the time of training, which a warning says. Attaching again
    changes what is given, and nothing else.

    Args:
        trainer: A trainer that has been built.
        telemetry_steps: Measure the routing in every n-th optimizer step; 0 switches telemetry off.
        layer_groups: Groups of consecutive layers that get log entries of their own; 0 for none.
        console_steps: Optimizer steps between two tables of the routing that the trainer prints in place of these
            entries; 0 prints none. Trackers get every entry all the same.
        router_lr: Learning rate of the routers; None for the trainer's.
        expert_lr: Learning rate of the experts; None for the trainer's. An expert of a sparse router sees K / E of the
            tokens: sqrt(K / E) times the rate of a dense adapter is a start (Hunyuan-Large, arXiv 2411.02265).
        lora_plus_ratio: Learning rate of the experts' up matrices over that of the experts (LoRA+, arXiv 2402.12354);
            None for one.

    Returns:
        The trainer.

    Raises:
        ValueError: It is no trainer, its model has no routed adapter or a frozen one, or its settings ask of the
            adapter what it cannot do. The trainer is as it was.
    """
    if not hasattr(trainer, "callback_handler"):
        raise ValueError(
            f"attach: {_name_of(trainer)} is no trainer of transformers or TRL. Write moe_peft.attach(trainer), "
            "before trainer.train(); a loop of your own needs no call."
        )
    check_count("attach", "telemetry_steps", telemetry_steps)
    check_count("attach", "layer_groups", layer_groups)
    check_count("attach", "console_steps", console_steps)
    check_adapter(trainer.model)
    check_training(trainer.args, trainer.model)
    check_sharded_dtypes(trainer)
    check_groups(trainer)
    rates = Rates(router_lr, expert_lr, lora_plus_ratio)
    check_rates(trainer, rates)

    set_learning_rates(trainer, rates)
    _prepare_model(trainer.args, trainer.model)
    if not isinstance(trainer.train, TrainingRun):
        trainer.train = TrainingRun(trainer, partial(_prepare_model, trainer.args))
        trainer.add_callback(RunCallback(trainer.train))
    if not any(isinstance(callback, MoeCallback) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(MoeCallback(telemetry_steps, layer_groups))
    if not isinstance(trainer.log, RoutingLog):
        trainer.log = RoutingLog(trainer)
    print_tables(trainer, console_steps)
    carry_groups(trainer)
    say_what_is_off(trainer)
    return trainer


def _prepare_model(args: Any, model: nn.Module) -> None:
    """Give a model the precision it trains in, and freeze what never trains, before processes wrap it.

    A checkpoint is copied into it before any callback runs.
    """
    FrozenTensors().freeze(model)
    if not uses_deepspeed(args):
        restore_precision(model)


def _name_of(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


class RoutingLog:
    """Stands in for a trainer's `log` method: adds the routing's entries to those of training steps.

    A callback's `on_log` is too late, as the trackers (tensorboard, wandb, trackio) and the log history have read the
    entries by then.

    Args:
        trainer: The trainer, one of whose callbacks measures the routing.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.log = trainer.log

    def __call__(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the entries "moe/..." where `logs` are of training steps; arguments as in `Trainer.log`."""
        if "loss" in logs:
            # A trainer that restores callbacks from a checkpoint makes new ones.
            for callback in self.trainer.callback_handler.callbacks:
                if isinstance(callback, MoeCallback):
                    logs.update(callback.read_metrics(self.trainer.state.global_step))
        self.log(logs, *args, **kwargs)
