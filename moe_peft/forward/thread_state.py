"""What each thread knows of the forwards it runs: the calls it is inside of, and whose rows they hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..types import Routing

if TYPE_CHECKING:
    from torch import nn

    from .forward_pass import ForwardPass
    from .group_columns import SampleGroups
    from .joined_losses import ForwardLosses

Observer = Callable[[str, str, Routing], None]


@dataclass
class Call:
    """One call of a hooked module, the whole model or a stack of it.

    Attributes:
        module: The module.
        training: Whether it is a training pass.
        task: The backward pass that it runs in; -1 outside of any.
        losses: Router losses of the call of the whole model it belongs to.
        is_model: Whether the module is the whole model.
        first_node: Number of the first autograd node that is made in it.
        in_checkpoint: Whether it is the first pass of a reentrant checkpoint around the model, without gradients.
        checkpoint: Autograd node of that checkpoint, here and in its recomputation.
        inputs: Its arguments by name.
        whole_inputs: Those of the call of the whole model it belongs to.
        groups: Sample groups of the batch.
        hooked: Whether hooks opened it, which also close it.
        reached: Whether the module's forward was reached.
        repeats: Whether it is a recomputation.
        forward_pass: What its layers are told; made when the first one asks.
        behind: Pass of the stack that ran last inside it.
        inside: Passes of all stacks that ran inside it.
        waiting: Those of them whose router losses are joined when it ends.
    """

    module: nn.Module
    training: bool
    task: int
    losses: ForwardLosses
    is_model: bool
    first_node: int = 0
    in_checkpoint: bool = False
    checkpoint: Any = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    whole_inputs: Mapping[str, Any] = field(default_factory=dict)
    groups: SampleGroups | None = None
    hooked: bool = False
    reached: bool = False
    repeats: bool = False
    forward_pass: ForwardPass | None = None
    behind: ForwardPass | None = None
    inside: list[ForwardPass] = field(default_factory=list)
    waiting: list[ForwardPass] = field(default_factory=list)


@dataclass(frozen=True)
class RowNames:
    """The adapter of each row of a batch.

    Attributes:
        names: One per row that the user gave.
        may_repeat: Whether the rows were seen to be as many, so that more of them are repetitions made by generation.
    """

    names: tuple[str, ...]
    may_repeat: bool

    def of_rows(self, num_rows: int) -> list[str]:
        """One name per row, or the names as they are where they do not fit."""
        times, rest = divmod(num_rows, len(self.names)) if self.names else (1, 0)
        if times > 1 and not rest and self.may_repeat:
            return [name for name in self.names for _ in range(times)]
        return list(self.names)


class ThreadState(threading.local):
    """What one thread knows; every thread finds its own.

    Attributes:
        calls: The calls of hooked modules that run, the outermost first.
        latest: Losses of the thread's latest training forward.
        observers: Called with (place, adapter, routing) for every routing of the thread's forwards.
        row_names: The adapter of each row in this thread's calls; None where all rows use the active ones.
        given_groups: Sample groups by column that a context manager gives to calls without them.
        reached: The pass whose backward pass runs or ran last in this thread.
        led: Decisions of blocks outside of any forward.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.latest: ForwardLosses | None = None
        self.observers: list[Observer] = []
        self.row_names: RowNames | None = None
        self.given_groups: dict[str, torch.Tensor] = {}
        self.reached: ForwardPass | None = None
        self.led: dict[tuple[str, str], Routing] = {}
