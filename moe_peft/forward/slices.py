"""Modules that a backbone runs in slices of the rows, to save memory: which positions a slice has, and its losses.

`chunk_size_feed_forward` and tiled MLPs call a module once for each slice. The slices of one pass are one measurement:
their sums are added up before a loss is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..messages import shown
from .joined_losses import LayerLosses


@dataclass(frozen=True)
class Slice:
    """Some of the tokens of a batch, which a module is given alone.

    Attributes:
        leading: (B, c) for c positions of every row, (n,) or (1, n) for n tokens of all rows in order.
        start: The first of the positions, or of the tokens; None where nothing tells it.
        flat: Whether they are tokens of all rows in order.
        assumed: Whether `start` was made of how many the module was given before.
    """

    leading: tuple[int, ...]
    start: int | None
    flat: bool = False
    assumed: bool = False

    def cut(self, tensor_T: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
        """The part of a tensor of all tokens.

        Args:
            tensor_T: (B L) one value per token.
            shape: (B, L).
        """
        if tensor_T is None or self.start is None:
            return None
        end = self.start + self.leading[-1]
        return tensor_T[self.start : end] if self.flat else tensor_T.view(shape)[:, self.start : end].reshape(-1)


def is_columns(leading: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Whether an input may have some positions of every row alone."""
    return len(leading) == 2 and leading[0] == shape[0] and 0 < leading[1] < shape[1]


def is_tile(leading: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Whether an input may have some tokens of all rows, one row after the other."""
    flat = len(leading) == 1 or (len(leading) == 2 and leading[0] == 1)
    return flat and 0 < leading[-1] < shape[0] * shape[1]


def position_in_storage(x: torch.Tensor, shape: tuple[int, int], *, flat: bool = False) -> int | None:
    """First position of a slice that is a view of the hidden states of all rows; None for any other tensor.

    Args:
        x: (B, c, D) input of a layer; (n, D) or (1, n, D) of flattened rows.
        shape: (B, L) of the batch.
        flat: Whether rows are flattened.
    """
    if x.dim() < 2 or torch.compiler.is_compiling() or x.stride(-1) != 1:
        return None
    (batch, length), width, size = shape, x.stride(-2), x.shape[-2]
    whole = batch * length * width * x.element_size()
    apart = not flat and batch > 1 and x.stride(0) != length * width
    if width < x.shape[-1] or apart or x.untyped_storage().nbytes() != whole:
        return None
    first, rest = divmod(int(x.storage_offset()), width)
    return first if rest == 0 and first + size <= (batch * length if flat else length) else None


def join_slices(made: Sequence[LayerLosses], tokens: int, place: str) -> list[list[LayerLosses]]:
    """Put the slices of a place's rows together.

    Args:
        made: What its calls measured, in order.
        tokens: Number of tokens of all rows.
        place: Its name, for the message.

    Returns:
        The calls in order, those that are slices of the same rows together.

    Raises:
        ValueError: A loss of slices has no meaning for the whole, or it is not known which tokens were measured.
    """
    groups: list[list[LayerLosses]] = []
    waiting: list[LayerLosses] = []
    for layer in made:
        if layer.part:
            waiting.append(layer)
        if not layer.part or sum(one.part for one in waiting) > tokens:
            groups += [[one] for one in waiting]
            waiting = []
        if not layer.part:
            groups.append([layer])
        elif waiting and sum(one.part for one in waiting) == tokens:
            groups.append(waiting)
            waiting = []
    groups += [[one] for one in waiting]
    for group in groups:
        _check(group, place)
    return groups


def _check(group: Sequence[LayerLosses], place: str) -> None:
    apart = [name for name, loss in group[0].losses.items() if not loss.additive]
    if len(group) > 1 and apart:
        raise ValueError(
            f"{place} is run in {len(group)} slices of the rows, of which the router loss {shown(apart[0])} "
            "cannot be put together. Set chunk_size_feed_forward=0 in the model's configuration (or switch "
            "tiling off), or the coefficient of that loss to 0."
        )
    if len(group) == 1 and group[0].assumed and not group[0].flat:
        raise ValueError(
            f"{place} has read {group[0].part} tokens alone, and which ones of the rows is not known, so that router "
            "losses would count the padding. Leave the place out of target_modules, give batches without padding (no "
            "attention_mask, or one of ones), or set the coefficients of the router losses to 0."
        )


def as_one(group: Sequence[LayerLosses]) -> LayerLosses:
    """The measurement of the rows whose slices were measured apart."""
    first = group[0]
    own = {name: torch.stack([layer.own[name] for layer in group]).sum(0) for name in first.own}
    return LayerLosses(first.losses, first.coefficients, first.scope, own)
