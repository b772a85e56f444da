"""Which axis of a stack's hidden states counts the positions: a few stacks compute with (L, B, D), not (B, L, D).

XLNet and FSMT turn their inputs around, and Longformer and LED those of their attention. The shape tells where B and L
differ. Where they are equal, the source of the stack does: `x = x.transpose(0, 1)` in its forward.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..types import TokenContext

TURNS = re.compile(r"^\s*(\w+) = \1\.transpose\(0, 1\)", re.MULTILINE)


def turned_shape(leading: tuple[int, ...], shape: tuple[int, ...] | None, stack: nn.Module | None) -> bool:
    """Whether an input has positions first and rows of the batch second.

    Args:
        leading: Shape of the input without its last dimension.
        shape: (B, L) of the batch; None when unknown.
        stack: The stack, or the whole model.
    """
    if shape is None or len(shape) != 2 or leading != shape[::-1] or 1 in shape:
        return False
    cls: Any = type(stack)
    return leading != shape or (stack is not None and bool(_turns(cls)))


def turns_before(cls: Any, child: str) -> bool:
    """Whether a module turns what it is given around before it calls one of its children, as Longformer's attention.

    Args:
        cls: Class of the module.
        child: Name of the child.
    """
    try:
        source = inspect.getsource(inspect.unwrap(cls.forward))
        given = next(name for name in inspect.signature(cls.forward).parameters if name != "self")
    except (AttributeError, OSError, TypeError, StopIteration):
        return False
    match = TURNS.search(source)
    call = source.find(f"self.{child}(")
    return match is not None and match.group(1) == given and match.start() < call


@torch.compiler.assume_constant_result
def _turns(cls: Any) -> bool:
    """Whether the forward of a class turns its input around."""
    return _source_turns(cls)


@lru_cache(maxsize=1024)
def _source_turns(cls: Any) -> bool:
    try:
        return TURNS.search(inspect.getsource(inspect.unwrap(cls.forward))) is not None
    except (AttributeError, OSError, TypeError):
        return False


def turned(context: TokenContext, shape: tuple[int, int]) -> TokenContext:
    """The same tokens in the order of a stack that has positions first.

    Args:
        context: (B L) tokens, row after row.
        shape: (B, L).
    """

    def turn(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.view(shape).T.reshape(-1)

    return replace(
        context,
        valid=turn(context.valid),
        sequences=turn(context.sequences),
        token_ids=turn(context.token_ids),
        prompt=turn(context.prompt),
        num_rows=1,
    )
