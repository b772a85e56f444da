"""One call that prepares a trainer for routed adapters: the callback, and the sample groups where they are needed."""

from __future__ import annotations

from typing import Any

from torch import nn

from .callback import MoeCallback
from .collator import GroupCollator


def attach(trainer: Any) -> Any:
    """Prepare a transformers or TRL trainer whose model has routed adapters. Call it before `trainer.train()`.

    Adds `MoeCallback`. Where an adapter balances by sample group, it also keeps the group's column through
    `remove_unused_columns` and carries it past the trainer's collator. Attaching twice changes nothing.

    Args:
        trainer: A trainer that has been built.

    Returns:
        The trainer.

    Raises:
        ValueError: Its model has no routed adapter.
    """
    configs = getattr(trainer.model, "peft_config", {})
    if not any(hasattr(config, "adapter_type") for config in configs.values()):
        raise ValueError(
            f"attach: {type(trainer.model).__name__} has no routed adapter. Give the trainer a peft_config of "
            "moe_peft, or a model from peft.get_peft_model."
        )
    if not any(isinstance(callback, MoeCallback) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(MoeCallback())
    for column in sorted(group_columns(trainer.model)):
        trainer.args.remove_unused_columns = False
        if not _carries(trainer.data_collator, column):
            trainer.data_collator = GroupCollator(trainer.data_collator, column)
    return trainer


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
