"""Sample groups for calls that cannot bring a batch column: `generate` refuses arguments that it does not know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..messages import shown
from .find import find_trackers
from .group_columns import as_groups, check_groups


@contextmanager
def groups(model: nn.Module, **columns: Any) -> Iterator[None]:
    """Give this thread's calls of a model the group of each sample.

        with moe_peft.groups(model, task_type=[0, 1]):
            model.generate(**batch, num_beams=4)

    Args:
        model: A model with routed adapters, wrapped or not.
        **columns: The batch column that an adapter reads groups from, and the group of each row of the batch. Rows
            that generation repeats keep theirs. A batch that has the column is taken at its word.

    Raises:
        TypeError: The model is no module.
        ValueError: No adapter reads the column, a group is no integer, or no expert belongs to it.
    """
    trackers = find_trackers(model)
    known = {name: allowed for tracker in trackers for name, allowed in tracker.group_columns.items()}
    given = {}
    for column, values in columns.items():
        if column not in known:
            raise ValueError(
                f"moe_peft.groups: no adapter of {type(model).__name__} reads sample groups from {shown(column)}; "
                f"those that are read are {sorted(known)}. They are named by `group_column`."
            )
        given[column] = as_groups(values, column)
        check_groups(given[column], column, known[column])
    before = [tracker.give_groups(given) for tracker in trackers]
    try:
        yield
    finally:
        for tracker, earlier in zip(trackers, before, strict=True):
            tracker.give_groups(earlier)
