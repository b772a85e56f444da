"""Carries the group of each sample from the data set to the model, past collators that keep only what they know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..forward.batch import segments_of


class GroupCollator:
    """Wraps a collator and adds the samples' groups to its batch.

    The trainer must not drop the column first: set `remove_unused_columns=False`.

    Args:
        collator: The trainer's own collator, called with the examples without the column.
        column: Name of the column with one integer per example, and of the batch entry (the configuration's
            `group_column`).
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], column: str = "task_type") -> None:
        self.collator = collator
        self.column = column

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
        missing = sum(self.column not in example for example in examples)
        if missing:
            raise ValueError(
                f"{missing} of {len(examples)} examples have no column {self.column!r}. Add it to the data set, one "
                "integer per example, name another in the adapter's group_column, or leave expert_groups out to "
                "balance without groups. Without moe_peft.attach also set remove_unused_columns=False in the training "
                "arguments, so that the trainer does not drop it."
            )
        groups = torch.tensor([self._group(example[self.column]) for example in examples])
        batch = self.collator([{k: v for k, v in example.items() if k != self.column} for example in examples])
        input_ids = batch.get("input_ids")
        if input_ids is not None and input_ids.shape[0] != len(examples):
            segments = segments_of(dict(batch))
            if input_ids.shape[0] != 1 or segments is None:
                raise ValueError(
                    f"The collator made {input_ids.shape[0]} rows of {len(examples)} examples, so a row has no single "
                    f"group {self.column!r}. Switch packing off, or use padding-free rows, which carry their segments."
                )
            groups = groups[segments.long().clamp_max(len(examples) - 1)]
        batch[self.column] = groups
        return batch

    def _group(self, value: Any) -> int:
        try:
            group = int(value)
        except (TypeError, ValueError):
            group = None
        if group is None or group != value:
            raise ValueError(
                f"The column {self.column!r} holds {value!r}, which is no group. Give one integer per example, as in "
                f"dataset.map(lambda row: {{{self.column!r}: 1 if row[...] == {value!r} else 0}})."
            )
        return group
