"""One call that prepares a trainer for routed adapters: the callback, and the sample groups where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from ..config.config import MoeConfig
from .callback import MoeCallback, restore_precision, uses_deepspeed
from .checks import check_training
from .collator import GroupCollator
from .parameter_groups import set_learning_rates


def attach(
    trainer: Any,
    *,
    telemetry_steps: int = 1,
    layer_groups: int = 4,
    router_lr: float | None = None,
    lora_plus_ratio: float | None = None,
) -> Any:
    """Prepare a transformers or TRL trainer whose model has routed adapters. Call it before `trainer.train()`.

    Adds `MoeCallback`, and what it measures to the trainer's logs (keys "moe/..."). Routers that the trainer cast to
    16 bit are float32 again. A checkpoint resumes in the precision it was saved in, and one of other experts of the
    backbone (ESFT) is refused. Where an adapter balances by sample group, it also keeps the group's column through
    `remove_unused_columns` and carries it past the trainer's collator. Attaching twice changes nothing.

    Args:
        trainer: A trainer that has been built.
        telemetry_steps: Measure the routing in every n-th optimizer step; 0 switches telemetry off.
        layer_groups: Groups of consecutive layers that get log entries of their own; 0 for none.
        router_lr: Learning rate of the routers; None for the trainer's.
        lora_plus_ratio: Learning rate of the experts' up matrices over the trainer's (LoRA+, arXiv 2402.12354); None
            for one.

    Returns:
        The trainer.

    Raises:
        ValueError: It is no trainer, its model has no routed adapter, or its settings ask of the adapter what it
            cannot do.
    """
    if not hasattr(trainer, "callback_handler"):
        raise ValueError(
            f"attach: {type(trainer).__name__} is no trainer of transformers or TRL. Write moe_peft.attach(trainer), "
            "before trainer.train(); a loop of your own needs no call."
        )
    configs = getattr(trainer.model, "peft_config", {})
    if not any(hasattr(config, "adapter_type") for config in configs.values()):
        raise ValueError(
            f"attach: {type(trainer.model).__name__} has no routed adapter. Give the trainer a peft_config of "
            "moe_peft, or a model from peft.get_peft_model."
        )
    check_training(trainer.args, trainer.model)
    set_learning_rates(trainer, router_lr, lora_plus_ratio)
    _prepare_resuming(trainer)
    if not any(isinstance(callback, MoeCallback) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(MoeCallback(telemetry_steps, layer_groups))
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, MoeCallback))
    if not isinstance(trainer.log, RoutingLog):
        trainer.log = RoutingLog(trainer, callback)
    for column in sorted(group_columns(trainer.model)):
        trainer.args.remove_unused_columns = False
        if not _carries(trainer.data_collator, column):
            trainer.data_collator = GroupCollator(trainer.data_collator, column)
    return trainer


def _prepare_resuming(trainer: Any) -> None:
    """Let the trainer copy a checkpoint into the adapter it was saved from, in the dtype that the weights train in.

    It copies before any callback runs, so routers must be float32 by then.
    """
    if not uses_deepspeed(trainer.args):
        restore_precision(trainer.model)
    model = trainer.model
    if isinstance(model, PeftModel) and not isinstance(model.load_adapter, partial):
        model.load_adapter = partial(_load_checkpoint, model, model.load_adapter)  # type: ignore[method-assign]


def _load_checkpoint(
    model: PeftModel, load: Callable[..., Any], model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Call peft's `load_adapter`, which reads the weights alone where there is an adapter of this name.

    Its default would turn the experts of a quantized model, which TRL trains in bfloat16, to float32.

    Raises:
        ValueError: The folder's configuration gives its weights another meaning; nothing has been changed.
    """
    config = model.peft_config.get(adapter_name)
    fields = config.weight_fields if isinstance(config, MoeConfig) else ()
    if fields and (Path(model_id) / CONFIG_NAME).is_file():
        saved = PeftConfig.from_pretrained(str(model_id))
        for field in fields:
            own, its = getattr(config, field), getattr(saved, field, None)
            if own != its:
                raise ValueError(
                    f"{model_id} holds weights of {field}={its!r}, which would be copied into an adapter of "
                    f"{field}={own!r}. Resume with the {field} of the checkpoint, or train in another output_dir."
                )
    return load(model_id, adapter_name, *args, **{"autocast_adapter_dtype": False, **kwargs})


class RoutingLog:
    """Stands in for a trainer's `log` method: adds the routing's entries to those of training steps.

    A callback's `on_log` is too late, as the trackers (tensorboard, wandb, trackio) and the log history have read the
    entries by then.

    Args:
        trainer: The trainer.
        callback: What measures its routing.
    """

    def __init__(self, trainer: Any, callback: MoeCallback) -> None:
        self.trainer = trainer
        self.callback = callback
        self.log = trainer.log

    def __call__(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the entries "moe/..." where `logs` are of training steps; arguments as in `Trainer.log`."""
        if "loss" in logs:
            logs.update(self.callback.read_metrics(self.trainer.state.global_step))
        self.log(logs, *args, **kwargs)


def group_columns(model: nn.Module) -> set[str]:
    """Batch columns that the adapters of a model need: those of configurations with `expert_groups`."""
    configs = getattr(model, "peft_config", {}).values()
    return {config.group_column for config in configs if getattr(config, "expert_groups", None) is not None}


def _carries(collator: Any, column: str) -> bool:
    while isinstance(collator, GroupCollator):
        if collator.column == column:
            return True
        collator = collator.collator
    return False
