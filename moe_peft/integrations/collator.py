"""Carries the group of each sample from the data set to the model, past collators that keep only what they know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..forward.batch import segments_of
from ..messages import shown


class GroupCollator:
    """Wraps a collator and adds the samples' groups to its batch.

    The trainer must not drop the column first: set `remove_unused_columns=False`.

    Args:
        collator: The trainer's own collator, called with the examples without the column.
        column: Name of the column with one integer per example, and of the batch entry (the configuration's
            `group_column`).
        required: Whether every example must have a group, as in training; otherwise a batch of which one has none goes
            without.

    Raises:
        ValueError: The collator cannot be called, or the column is no name.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        column: str = "task_type",
        *,
        required: bool = True,
    ) -> None:
        if not callable(collator):
            raise ValueError(f"GroupCollator: collator={shown(collator)} must be the trainer's data_collator.")
        if not isinstance(column, str) or not column:
            raise ValueError(f"GroupCollator: column={shown(column)} must be the name of a column, as 'task_type'.")
        self.collator = collator
        self.column = column
        self.required = required

    def optional(self) -> GroupCollator:
        """The same collator for evaluation, where no router loss needs a group."""
        inner = self.collator.optional() if isinstance(self.collator, GroupCollator) else self.collator
        return GroupCollator(inner, self.column, required=False)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples.

        Args:
            examples: One dict per sample.

        Returns:
            The inner collator's batch, with `column` as a (B,) int64 tensor.

        Raises:
            ValueError: An example has no group or one that is no integer, or the inner collator joined several
                examples in a row, so that a row has no single group.
        """
        if self.required:
            self._check(examples)
        elif any(_as_group(example.get(self.column)) is None for example in examples):
            return self.collator([self._without_group(example) for example in examples])
        groups = torch.tensor([_as_group(example[self.column]) for example in examples])
        batch = self.collator([self._without_group(example) for example in examples])
        input_ids = batch.get("input_ids")
        if input_ids is not None and input_ids.shape[0] != len(examples):
            segments = segments_of(dict(batch))
            if input_ids.shape[0] != 1 or segments is None:
                if not self.required:
                    return batch
                raise ValueError(
                    f"The collator made {input_ids.shape[0]} rows of {len(examples)} examples, so a row has no single "
                    f"group {shown(self.column)}. Switch packing off, or use padding-free rows, which carry their "
                    "segments."
                )
            groups = groups[segments.long().clamp_max(len(examples) - 1)]
        batch[self.column] = groups
        return batch

    def _without_group(self, example: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in example.items() if name != self.column}

    def _check(self, examples: list[dict[str, Any]]) -> None:
        missing = sum(self.column not in example for example in examples)
        if missing:
            raise ValueError(
                f"{missing} of {len(examples)} examples have no column {shown(self.column)}. Add it to the data set, "
                "one integer per example, name another in the adapter's group_column, or leave expert_groups out to "
                "balance without groups. Without moe_peft.attach also set remove_unused_columns=False in the "
                "training arguments, so that the trainer does not drop it."
            )
        for value in (example[self.column] for example in examples):
            if _as_group(value) is None:
                raise ValueError(
                    f"The column {shown(self.column)} holds {shown(value)}, which is no group. Give one integer per "
                    f"example{self._advice(value)}"
                )

    def _advice(self, value: Any) -> str:
        column = shown(self.column)
        if value is None:
            return (
                ": fill in the group of the examples that lack one, or leave them out with "
                f"dataset.filter(lambda row: row[{column}] is not None)."
            )
        if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return f", not its digits as text: dataset.cast_column({column}, datasets.Value('int64'))."
        return f", as in dataset.map(lambda row: {{{column}: 1 if row[...] == {shown(value)} else 0}})."


def _as_group(value: Any) -> int | None:
    """The integer that a group is, from a number or a 0-d tensor of any type; None where it is none."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        group = int(value)
        return group if group == value and abs(group) < 2**63 else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
