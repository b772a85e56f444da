"""Reads a model's inputs: which tokens are padding, which document they belong to, which group a sample is in."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..messages import shown

IGNORED_LABEL = -100
# What decoders call the states of the encoder that they attend to.
ENCODER_STATES = "encoder_hidden_states"


def named_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the positional arguments of a module's forward.

    Args:
        module: Module that is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        All arguments by name.
    """
    if not args:
        return kwargs
    names = [p for p in inspect.signature(module.forward).parameters if p not in ("args", "kwargs")]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def batch_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(B, L) of the token ids or embeddings; None where there are none.

    Decoders of sound take the ids of all codebooks as rows of their own, (B * codebooks, L).
    """
    for name in ("input_ids", "inputs_embeds"):
        tensor = inputs.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2:
            return _number_of_samples(inputs, tensor), tensor.shape[1]
    return None


def _number_of_samples(inputs: Mapping[str, Any], tokens: torch.Tensor) -> int:
    """B, where the mask or the encoder states have a row for each sample and the tokens have several."""
    num_rows, mask, states = tokens.shape[0], two_dimensional(inputs.get("attention_mask")), inputs.get(ENCODER_STATES)
    if mask is not None and mask.shape[1] == tokens.shape[1]:
        samples = mask.shape[0]
    elif tokens.ndim == 2 and isinstance(states, torch.Tensor) and states.ndim == 3:
        samples = states.shape[0]
    else:
        return num_rows
    return samples if samples and num_rows % samples == 0 else num_rows


def mask_of(inputs: Mapping[str, Any], whole: Mapping[str, Any], shape: tuple[int, int] | None) -> torch.Tensor | None:
    """The mask of a stack's own tokens.

    A decoder whose batch has labels alone is given none: its padding is what comes after the last label of a row.

    Args:
        inputs: Arguments of the stack.
        whole: Those of the call of the whole model that it belongs to, which may be the same.
        shape: (B, L) of the stack's tokens.

    Returns:
        (B, L), or longer where earlier tokens are cached; None where all tokens are valid.
    """
    own = two_dimensional(inputs.get("attention_mask"))
    if own is not None or inputs.get(ENCODER_STATES) is None:
        return own
    given = two_dimensional(whole.get("decoder_attention_mask"))
    if given is not None:
        return given if tuple(given.shape) == shape else None
    labels = two_dimensional(whole.get("labels"))
    if labels is None or labels.is_floating_point() or tuple(labels.shape) != shape:
        return None
    return (labels != IGNORED_LABEL).flip(1).cummax(1).values.flip(1)


def two_dimensional(value: Any) -> torch.Tensor | None:
    """The value where it is a (B, L) tensor, as a mask of padding is; None for masks of pairs and all else."""
    return value if isinstance(value, torch.Tensor) and value.ndim == 2 else None


def first_mask(inputs: Mapping[str, Any], names: Iterable[str]) -> torch.Tensor | None:
    """The first (B, L) tensor among inputs of some names; None where there is none."""
    masks = (two_dimensional(inputs.get(name)) for name in names)
    return next((mask for mask in masks if mask is not None), None)


def segments_of(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """(B, L) number that changes where a new document starts; None for rows that are not packed."""
    seq_idx = two_dimensional(inputs.get("seq_idx"))
    if seq_idx is not None:
        return seq_idx
    positions = inputs.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.ndim == 3 and positions.shape[0] == 4:
        # Those of the text, then time, height and width.
        positions = positions[0]
    positions = two_dimensional(positions)
    if positions is None or two_dimensional(inputs.get("attention_mask")) is not None:
        return None
    restarts = torch.zeros_like(positions)
    restarts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).to(positions.dtype)
    return restarts.cumsum(1)


def further_inputs(
    inputs: Mapping[str, Any], whole: Mapping[str, Any], shape: tuple[int, int] | None, needs: frozenset[str]
) -> dict[str, Any]:
    """What parts ask of a batch beside masks and documents.

    Args:
        inputs: Arguments of the stack.
        whole: Those of the call of the whole model that it belongs to, which may be the same.
        shape: (B, L) of the stack's tokens.
        needs: Names of what is asked for.

    Returns:
        "token_ids" (B, L), "prompt" (B, L) bool and "cached", as far as they are asked for and the batch has them.
    """
    found: dict[str, Any] = {}
    if "token_ids" in needs:
        ids = (two_dimensional(source.get("input_ids")) for source in (inputs, whole))
        found["token_ids"] = next((own for own in ids if own is not None and tuple(own.shape) == shape), None)
    if "prompt" in needs:
        labels = two_dimensional(whole.get("labels", inputs.get("labels")))
        if labels is not None and tuple(labels.shape) == shape:
            found["prompt"] = prompt_of(labels, two_dimensional(inputs.get("attention_mask")), segments_of(inputs))
    cache = inputs.get("past_key_values")
    if "cached" in needs and cache is not None:
        found["cached"] = int(cache.get_seq_length())
    return found


def prompt_of(labels_BL: torch.Tensor, mask_BL: torch.Tensor | None, segments_BL: torch.Tensor | None) -> torch.Tensor:
    """Which tokens a sample is given, before those that it is to learn.

    The first token of a sample always is, as labels are shifted: nothing predicts it.

    Args:
        labels_BL: (B, L) labels, -100 where none is learnt.
        mask_BL: (B, L) mask of padding; None where there is none.
        segments_BL: (B, L) document index of each token of packed rows; None where a row is one sample.

    Returns:
        (B, L) bool.
    """
    labelled_BL = labels_BL != IGNORED_LABEL
    seen_BL = labelled_BL.cumsum(1)
    if segments_BL is None:
        valid_BL = torch.ones_like(labels_BL) if mask_BL is None or mask_BL.shape != labels_BL.shape else mask_BL
        return (seen_BL == 0) | ((valid_BL.cumsum(1) == 1) & valid_BL.bool())
    begins_BL = torch.ones_like(labelled_BL)
    begins_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    before_BL = torch.where(begins_BL, seen_BL - labelled_BL.long(), 0).cummax(1).values
    return (seen_BL == before_BL) | begins_BL


def number_segments(segments_BL: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Number the documents of all rows one after the other: (T,) index and S."""
    starts_BL = torch.ones_like(segments_BL, dtype=torch.long)
    starts_BL[:, 1:] = (segments_BL[:, 1:] != segments_BL[:, :-1]).long()
    sequences_T = starts_BL.reshape(-1).cumsum(0) - 1
    return sequences_T, int(starts_BL.sum())


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
            if groups.device.type == "cpu" or column not in checked:
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


def check_groups(groups: torch.Tensor, column: str, allowed: frozenset[int]) -> None:
    """Refuse sample groups that no expert belongs to.

    Args:
        groups: Groups of a batch, of any shape.
        column: Name of the batch column, for the message.
        allowed: Groups that experts belong to; empty allows any.

    Raises:
        ValueError: A sample has another group.
    """
    unknown = sorted(set(groups.reshape(-1).tolist()) - allowed) if allowed else []
    if unknown:
        raise ValueError(
            f"The batch column {shown(column)} holds the sample groups {shown(unknown)}, which no expert belongs to "
            f"and no router knows (known are {shown(sorted(allowed))}). Change `expert_groups`, or the number of "
            "groups in `router_args`, so that every sample group is known, or map the column to those that are."
        )
