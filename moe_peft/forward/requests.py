"""What callers ask of the forwards to come: sample groups, the adapter of each row, a look at the routings.

All of it belongs to a thread, so that requests served side by side do not meet.
"""

from __future__ import annotations

import threading

import torch

from ..messages import shown
from .thread_state import Observer, RowNames, ThreadState


class Requests:
    """The requests of this thread for the forwards of one model.

    Attributes:
        training_observers: Called with (place, adapter, routing) for every routing of a training pass of any thread.
    """

    training_observers: list[Observer]
    _thread: ThreadState
    _busy: dict[int, threading.Thread]

    @property
    def observers(self) -> list[Observer]:
        """Called with (place, adapter, routing) for every routing of this thread's forwards."""
        return self._thread.observers

    def give_groups(self, groups: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Set the sample groups of this thread's calls that bring none; returns what was set before."""
        before = self._thread.given_groups
        self._thread.given_groups = groups
        return before

    def watched(self) -> bool:
        """Whether anybody looks at the routings of this thread's forwards."""
        return bool(self._thread.observers or self.training_observers)

    def row_names(self, x: torch.Tensor) -> list[str] | None:
        """The adapter of each row of a layer's input in this thread's call; None where all rows use the active ones.

        Args:
            x: (B, ...) input, whose rows generation may have repeated.
        """
        names = self._thread.row_names
        return None if names is None else names.of_rows(x.shape[0])

    def mixes_rows(self) -> bool:
        """Whether this thread's call names the adapter of each row."""
        return self._thread.row_names is not None

    def give_row_names(self, names: RowNames | None) -> RowNames | None:
        """Set the adapter of each row in this thread's calls to come; returns what was set before."""
        before = self._thread.row_names
        self._thread.row_names = names
        return before

    def refuse_in_use(self, operation: str) -> None:
        """Refuse to change adapters under another thread's forward.

        Args:
            operation: What is to be done, for the message.

        Raises:
            RuntimeError: Another thread is inside a forward of the model.
        """
        own = threading.get_ident()
        others = [t.name for ident, t in list(self._busy.items()) if ident != own and t.is_alive()]
        if others:
            raise RuntimeError(
                f"{operation} would change the adapters of a forward that runs in the thread {shown(others[0])}. "
                "Which adapter is active is one setting of the whole model: let requests name theirs with "
                "adapter_names=[...], or change it while no other thread uses the model."
            )
