"""Modules that a backbone runs in slices of the rows, to save memory: which positions a slice has, and its losses.

`chunk_size_feed_forward` and tiled MLPs call a module once for each slice. The slices of one pass are one measurement:
their sums are added up before a loss is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..messages import shown
from .joined_losses import LayerLosses


def position_in_storage(x: torch.Tensor, shape: tuple[int, int]) -> int | None:
    """First position of a slice that is a view of the hidden states of all rows; None for any other tensor.

    Args:
        x: (B, c, D) input of a layer.
        shape: (B, L) of the batch.
    """
    if x.dim() != 3 or torch.compiler.is_compiling() or x.stride(-1) != 1:
        return None
    (batch, length), width = shape, x.stride(1)
    whole = batch * length * width * x.element_size()
    if width < x.shape[-1] or (batch > 1 and x.stride(0) != length * width) or x.untyped_storage().nbytes() != whole:
        return None
    first, rest = divmod(int(x.storage_offset()), width)
    return first if rest == 0 and first + x.shape[1] <= length else None


def join_slices(made: Sequence[LayerLosses], length: int, place: str) -> list[list[LayerLosses]]:
    """Put the slices of a place's rows together.

    Args:
        made: What its calls measured, in order.
        length: L, positions of a row.
        place: Its name, for the message.

    Returns:
        The calls in order, those that are slices of the same rows together.

    Raises:
        ValueError: A loss of slices has no meaning for the whole.
    """
    groups: list[list[LayerLosses]] = []
    waiting: list[LayerLosses] = []
    for layer in made:
        waiting = [*waiting, layer] if layer.part else []
        if not layer.part or sum(one.part for one in waiting) > length:
            groups += [[one] for one in (waiting or [layer])]
            waiting = []
        elif sum(one.part for one in waiting) == length:
            groups.append(waiting)
            waiting = []
    groups += [[one] for one in waiting]
    for group in groups:
        apart = [name for name, loss in group[0].losses.items() if not loss.additive]
        if len(group) > 1 and apart:
            raise ValueError(
                f"{place} is run in {len(group)} slices of the rows, of which the router loss {shown(apart[0])} "
                "cannot be put together. Set chunk_size_feed_forward=0 in the model's configuration (or switch "
                "tiling off), or the coefficient of that loss to 0."
            )
    return groups


def as_one(group: Sequence[LayerLosses]) -> LayerLosses:
    """The measurement of the rows whose slices were measured apart."""
    first = group[0]
    own = {name: torch.stack([layer.own[name] for layer in group]).sum(0) for name in first.own}
    return LayerLosses(first.losses, first.coefficients, first.scope, own)
