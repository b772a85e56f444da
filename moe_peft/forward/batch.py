"""Reads a model's inputs: which tokens are padding, and which document they belong to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

IGNORED_LABEL = -100
# What decoders call the states of the encoder that they attend to.
ENCODER_STATES = "encoder_hidden_states"
# What models call the keys and values of earlier tokens, since transformers 5.24 and before.
CACHES = ("cache", "past_key_values")


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


def mask_of(
    inputs: Mapping[str, Any], whole: Mapping[str, Any], shape: tuple[int, int] | None, config: Any = None
) -> torch.Tensor | None:
    """The mask of a stack's own tokens.

    A decoder whose batch has labels alone is given none: its padding is what comes after the last label of a row. A
    trainer that smooths labels keeps them to itself: what comes after a row's last token is padding then.

    Args:
        inputs: Arguments of the stack.
        whole: Those of the call of the whole model that it belongs to, which may be the same.
        shape: (B, L) of the stack's tokens.
        config: Configuration of the stack, which says what tokens of padding and ends are; None where there is none.

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
    if labels is None:
        return _before_padding(two_dimensional(inputs.get("input_ids")), shape, config)
    if labels.is_floating_point() or tuple(labels.shape) != shape:
        return None
    return (labels != IGNORED_LABEL).flip(1).cummax(1).values.flip(1)


def _before_padding(ids: torch.Tensor | None, shape: tuple[int, int] | None, config: Any) -> torch.Tensor | None:
    """Which tokens of a decoder have a label, by their ids: those before the last one of a row that is no padding.

    Labels are shifted to the right to make them, so that the token of the end, which predicts nothing, has none.
    """
    padding, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if ids is None or not isinstance(padding, int) or tuple(ids.shape) != shape or ids.shape[1] < 2:
        return None
    positions = torch.arange(ids.shape[1], device=ids.device)
    last_B = torch.where(ids != padding, positions, 0).amax(1)
    ended_B = torch.zeros_like(last_B, dtype=torch.bool)
    for end in ends if isinstance(ends, (list, tuple)) else [ends]:
        if isinstance(end, int) and end != padding:
            ended_B |= ids.gather(1, last_B[:, None])[:, 0] == end
    return positions <= (last_B - (ended_B & (last_B > 0)).to(last_B.dtype))[:, None]


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
    cache = next((own for name in CACHES if hasattr(own := inputs.get(name), "get_seq_length")), None)
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
