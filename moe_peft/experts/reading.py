"""What a decision reads of experts: projections of which nothing has been dropped, in float32 whatever the dtype is.

Scores of 16 bits flip the top-k of about one token in five hundred, so a router that compares what experts make of the
input is given that in float32, also where their weights, the input or autocast have 16 bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from ..ops import outside_autocast
from ..types import TokenContext


class Reader(Protocol):
    """A bank whose `prepare` computes in the dtype of its input where autocast is off."""

    def prepare(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """See `Experts.prepare`."""
        ...


def read_for_decision(
    bank: Reader, x_TD: torch.Tensor, h: torch.Tensor, context: TokenContext, *, dropped: bool
) -> torch.Tensor:
    """What a bank makes of the input as a decision needs it.

    Args:
        bank: The bank.
        x_TD: (T, D) input as it came, not rounded by autocast.
        h: What `prepare` has made of it in this pass.
        context: What is known about the tokens.
        dropped: Whether `h` lacks a part of the input by dropout.

    Returns:
        `h` itself where it is float32 or wider and whole; else what `prepare` makes of the input in such a dtype.
    """
    if not dropped and h.dtype.itemsize >= 4:
        return h
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    with outside_autocast(x_TD.device.type):
        return bank.prepare(x_TD.to(wide), replace(context, training=False))
