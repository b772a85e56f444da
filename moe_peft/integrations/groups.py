"""Carries sample groups from a trainer's data set to the router losses that need them, and leaves evaluation alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config.config import MoeConfig
from ..layers import routed_layers
from ..messages import shown
from .collator import GroupCollator


def routed_configs(model: nn.Module) -> list[MoeConfig]:
    """Configurations of all routed adapters, wherever in a model's tree they are.

    Args:
        model: An adapted model, or one that contains some.
    """
    found: dict[int, MoeConfig] = {}
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, dict) else ():
            if isinstance(config, MoeConfig):
                found[id(config)] = config
    return list(found.values())


def group_columns(model: nn.Module) -> set[str]:
    """Batch columns that the adapters of a model need: for `expert_groups`, and for parts that read the groups.

    Args:
        model: An adapted model, or one that contains some.
    """
    columns = {column for config in routed_configs(model) for column, groups in config.group_columns.items() if groups}
    for layer in routed_layers(model):
        if "groups" in layer.tracker.needs:
            columns |= set(layer.tracker.group_columns)
    return columns


def check_groups(trainer: Any) -> None:
    """Refuse a trainer whose batches cannot bring the sample groups that its adapters need.

    Args:
        trainer: The trainer.

    Raises:
        ValueError: It packs samples of several groups in a row, or its data has no such column.
    """
    for column in sorted(group_columns(trainer.model)):
        reader = _reader(trainer.model, column)
        without = "take a part that reads none"
        if reader == "expert_groups":
            without = "set expert_groups=None to balance without groups"
        if getattr(trainer.args, "packing", False):
            raise ValueError(
                f"attach: packing=True joins samples, so that a row has no single group, and drops the column "
                f"{shown(column)}, but {reader} needs the group of every sample. Set packing=False, with "
                f"padding_free=True to save the padding all the same, or {without}."
            )
        names = getattr(trainer.train_dataset, "column_names", None)
        if isinstance(names, list) and column not in names:
            raise ValueError(
                f"attach: the training data has no column {shown(column)} (it has {shown(names)}), but {reader} needs "
                "the group of every sample. Add the column, one integer per example, name another in the adapter's "
                f"group_column, or {without}."
            )


def _reader(model: nn.Module, column: str) -> str:
    """What reads the groups of a column: a field of a configuration, or the class of a part."""
    readers = [own for config in routed_configs(model) for own in config.group_readers.get(column, [])]
    return readers[0] if readers else "a part of the adapter"


def carry_groups(trainer: Any) -> None:
    """Let a trainer keep the column of the sample groups, past its collator and into its batches.

    Args:
        trainer: The trainer.
    """
    for column in sorted(group_columns(trainer.model)):
        trainer.args.remove_unused_columns = False
        if not _carries(trainer.data_collator, column):
            trainer.data_collator = GroupCollator(trainer.data_collator, column)
    if isinstance(trainer.data_collator, GroupCollator):
        for name in ("get_eval_dataloader", "get_test_dataloader"):
            if not isinstance(getattr(trainer, name), WithoutGroups):
                setattr(trainer, name, WithoutGroups(trainer, name))


class WithoutGroups:
    """Stands in for the method of a trainer that makes a loader of evaluation data, which need bring no groups.

    Args:
        trainer: The trainer.
        name: Name of the method.
    """

    def __init__(self, trainer: Any, name: str) -> None:
        self.trainer = trainer
        self.make = getattr(trainer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the loader; arguments as of the method."""
        collator = self.trainer.data_collator
        self.trainer.data_collator = collator.optional() if isinstance(collator, GroupCollator) else collator
        try:
            return self.make(*args, **kwargs)
        finally:
            self.trainer.data_collator = collator


def _carries(collator: Any, column: str) -> bool:
    while isinstance(collator, GroupCollator):
        if collator.column == column:
            return True
        collator = collator.collator
    return False
