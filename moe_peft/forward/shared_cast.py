"""One cast for all that read the same input next: routers of query, key and value, of gate and up projection.

A router of a 16-bit model reads its input in float32. Its product keeps the 16-bit input alone and casts it again in
the backward pass; siblings that read the same input take the copy of the one before them, in both directions. One copy
lives at a time in a thread, until another input is cast, or until the forward or backward pass ends.
"""

from __future__ import annotations

import threading

import torch


class LastCast(threading.local):
    """The input that a thread has cast last, and its copy.

    Attributes:
        source: The input, which holds its memory as long as it is compared with.
        version: How often that had been written to.
        copy: The input in another dtype, without a graph.
    """

    source: torch.Tensor | None = None
    version: int = 0
    copy: torch.Tensor | None = None

    def forget(self) -> None:
        """Let this thread's input and copy go."""
        self.__dict__.clear()

    def holds(self, x: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether the copy is what a cast of this input would give.

        Args:
            x: The same memory in the same layout, unchanged.
            dtype: What it is to be cast to.
        """
        own = self.source
        if own is None or self.copy is None or self.copy.dtype != dtype or own.dtype != x.dtype:
            return False
        if own.shape != x.shape or own.stride() != x.stride() or own.storage_offset() != x.storage_offset():
            return False
        return own.untyped_storage()._cdata == x.untyped_storage()._cdata and x._version == self.version


LAST = LastCast()


def shared_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast an input, or take the copy that a sibling has made of it.

    For passes that autograd will differentiate by functions of their own: these rely on the counter of writes that
    tells here whether an input has changed, and on its memory not being written to behind that.

    Args:
        x: (..., D) input.
        dtype: That of the result.

    Returns:
        x in that dtype, not to be written to; with a graph where gradients are enabled, and made anew then.
    """
    if x.dtype == dtype:
        return x
    if torch.is_grad_enabled() or x.is_inference():
        return x.to(dtype)
    if not LAST.holds(x, dtype):
        LAST.source, LAST.version, LAST.copy = x.detach(), x._version, x.to(dtype)
        if torch._C._current_graph_task_id() != -1:  # no pass of the model ends after a backward pass
            # Another thread than that of a device may call back, so that it is given this thread's own.
            torch.autograd.Variable._execution_engine.queue_callback(LAST.__dict__.clear)
    assert LAST.copy is not None
    return LAST.copy


def forget_cast() -> None:
    """Let this thread's last input and copy go, as where a pass has ended."""
    LAST.forget()
