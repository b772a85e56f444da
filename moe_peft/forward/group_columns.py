"""Reads the columns of a batch that say which group a sample is in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..messages import shown
from .host_checks import assert_known, operator_of


@dataclass(frozen=True)
class SampleGroups:
    """Sample groups of a batch.

    Attributes:
        values: int64, one per sequence, or one per token of packed rows.
        may_repeat: Whether they were given for rows that generation repeats.
        optional: Whether nothing needs them, so that groups of another shape are left out.
    """

    values: torch.Tensor
    may_repeat: bool = False
    optional: bool = False


def take_groups(
    kwargs: dict[str, Any],
    columns: Mapping[str, frozenset[int]],
    *,
    given: Mapping[str, torch.Tensor],
    needed: bool,
    watched: bool = False,
    checked: set[str],
) -> SampleGroups | None:
    """Take the sample groups out of a model's arguments.

    Args:
        kwargs: The arguments, from which the columns of groups are removed.
        columns: Column -> groups that experts belong to; empty allows any.
        given: Column -> groups that a context manager gives to calls without them.
        needed: Whether anything reads them in this call; else the columns may hold whatever they hold.
        watched: Whether somebody looks at the routings, who sees the groups where they are good ones.
        checked: Columns whose values on a device were looked at before; looking waits for the device.

    Returns:
        The groups; None where nothing reads them, or the batch has none.

    Raises:
        ValueError: A sample has a group that no expert belongs to, or a value is no integer.
    """
    found = None
    for column, allowed in columns.items():
        value = kwargs.pop(column, None)
        if not needed:
            found = (_good_groups(value, column, allowed) if watched else None) or found
            continue
        if value is not None:
            groups = as_groups(value, column)
            if torch.compiler.is_compiling():
                groups = _checked_when_run(groups, column, allowed)
            elif groups.device.type == "cpu" or column not in checked:
                check_groups(groups, column, allowed)
                checked.add(column)
            found = SampleGroups(groups)
        elif column in given:
            found = SampleGroups(given[column], may_repeat=True)
    return found


def _good_groups(value: Any, column: str, allowed: frozenset[int]) -> SampleGroups | None:
    """Sample groups that nothing needs; None where there are none, or not such as training takes."""
    try:
        groups = as_groups(value, column)
        check_groups(groups, column, allowed)
    except ValueError:
        return None
    return SampleGroups(groups, optional=True)


def as_groups(value: Any, column: str) -> torch.Tensor:
    """Sample groups as an int64 tensor.

    Args:
        value: A tensor, or a list of integers.
        column: Name of the batch column, for the message.

    Raises:
        ValueError: A value is no integer.
    """
    try:
        groups = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        groups = None
    if groups is None or groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise ValueError(
            f"The batch column {shown(column)} must hold the group of every sample as an integer, not {shown(value)}."
        )
    return groups.long()


def groups_per_sequence(
    groups: SampleGroups | None, sequences_T: torch.Tensor | None, num_sequences: int, rows: tuple[int, ...]
) -> torch.Tensor | None:
    """Bring groups given per sequence, or per token of packed rows, to one per sequence.

    Args:
        groups: (S,), or of shape `rows`; None when the batch has none.
        sequences_T: (T,) sequence of each token.
        num_sequences: S.
        rows: Shape of the batch without the width.

    Returns:
        (S,) or None.

    Raises:
        ValueError: The groups have another shape.
    """
    if groups is None:
        return None
    values = groups.values if sequences_T is None else groups.values.to(sequences_T.device)
    if tuple(values.shape) == (num_sequences,):
        return values
    if tuple(values.shape) == rows and sequences_T is not None:
        return values.new_zeros(num_sequences).scatter(0, sequences_T, values.reshape(-1))
    if groups.may_repeat and values.numel() and num_sequences % values.numel() == 0:
        return values.repeat_interleave(num_sequences // values.numel())
    if groups.optional:
        return None
    raise ValueError(
        f"The batch brings sample groups of shape {tuple(values.shape)}, but it holds {num_sequences} sequences in "
        f"rows of shape {rows}. Give one group per sequence (shape ({num_sequences},)), or one per token "
        f"(shape {rows}) when rows are packed."
    )


def check_groups(groups: torch.Tensor, column: str, allowed: Iterable[int]) -> None:
    """Refuse sample groups that no expert belongs to.

    Args:
        groups: Groups of a batch, of any shape.
        column: Name of the batch column, for the message.
        allowed: Groups that experts belong to; empty allows any.

    Raises:
        ValueError: A sample has another group.
    """
    allowed = frozenset(allowed)
    unknown = sorted(set(groups.reshape(-1).tolist()) - allowed) if allowed else []
    if unknown:
        raise ValueError(
            f"The batch column {shown(column)} holds the sample groups {shown(unknown)}, which no expert belongs to "
            f"and no router knows (known are {shown(sorted(allowed))}). Change `expert_groups`, or the number of "
            "groups in `router_args`, so that every sample group is known, or map the column to those that are."
        )


_known_groups = operator_of("known_groups", lambda groups, allowed, column: check_groups(groups, column, allowed))


def _checked_when_run(groups: torch.Tensor, column: str, allowed: frozenset[int]) -> torch.Tensor:
    """Groups that compiled code checks in each run: on a device by an assertion that nothing waits for."""
    if not allowed:
        return groups
    if groups.device.type == "cpu":
        return _known_groups(groups, sorted(allowed), column)
    assert_known(groups, sorted(allowed), "The batch holds sample groups that no expert and no router knows")
    return groups
