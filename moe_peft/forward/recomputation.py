"""Whether code runs inside a backward pass, and whether it repeats a forward there, as checkpointing has it do.

A backward pass may also run forwards of its own: losses that cache gradients call the model in a hook. What is a
recomputation is told by who asks for it, a checkpoint of torch, and what it repeats by the autograd node that the
engine is at: nodes are numbered, so a pass knows the numbers of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import CodeType
from typing import Any, Protocol, TypeVar

import torch
from torch.autograd.graph import _engine_run_backward
from torch.utils import checkpoint

_ENGINE: CodeType = _engine_run_backward.__code__
_REENTRANT: tuple[CodeType, ...] = (
    checkpoint.CheckpointFunction.forward.__code__,
    checkpoint.CheckpointFunction.backward.__code__,
)
_UNPACK = "unpack_hook"

# Of a caller outside any backward pass.
NO_TASK = -1


class Numbered(Protocol):
    """What has a range of autograd node numbers: those from `first_node` to before `last_node` are its own."""

    first_node: int
    last_node: int


NumberedT = TypeVar("NumberedT", bound=Numbered)


def graph_task() -> int:
    """Number of the backward pass that the caller runs in, `NO_TASK` outside; compiled code always seems outside."""
    return NO_TASK if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether the caller runs inside a backward pass, as recomputations of gradient checkpointing do."""
    return torch._C._current_graph_task_id() != NO_TASK


def next_node() -> int:
    """Number that the thread's next autograd node gets; zero in compiled code, which makes none."""
    return 0 if torch.compiler.is_compiling() else torch.autograd._get_sequence_nr()


def checkpoint_node() -> tuple[bool, Any]:
    """Look for the checkpoint that the caller runs for, no farther than the start of the backward pass it is in.

    Returns:
        Whether there is one, and its autograd node where it is of the reentrant kind, the same in its forward and its
        backward; else None.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _ENGINE:
        code = frame.f_code
        if code in _REENTRANT:
            return True, frame.f_locals["ctx"]
        if code.co_name == _UNPACK and code.co_filename == checkpoint.__file__:
            return True, None
        frame = frame.f_back
    return False, None


def owner_of_current_node(passes: Iterable[NumberedT]) -> NumberedT | None:
    """The innermost of some passes that made the autograd node whose backward runs; the latest where none did.

    Args:
        passes: In the order in which the backward pass reached them.
    """
    found = list(passes)
    if len(found) < 2:
        return found[0] if found else None
    node = torch._C._current_autograd_node()
    number = node._sequence_nr() if node is not None else NO_TASK
    owners = [one for one in found if one.first_node <= number < one.last_node]
    return max(owners, key=lambda one: (one.first_node, -one.last_node)) if owners else found[-1]
