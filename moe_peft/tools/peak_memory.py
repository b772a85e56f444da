"""How much memory a piece of work takes at most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def rise_of_memory(run: Callable[[], T]) -> tuple[T, int | None]:
    """Do something, and measure by how much it raises the peak of memory above what is in use when it starts.

    Args:
        run: The work.

    Returns:
        What `run()` returns, and bytes: of the GPU that is current, else of this process's resident memory; None where
        the system does not count them (Linux does).
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif not _starts_anew():
        return run(), None
    before = torch.cuda.memory_allocated() if cuda else _resident("VmRSS")
    result = run()
    return result, max(0, (torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")) - before)


def _starts_anew() -> bool:
    """Let the kernel forget the peak of this process so far.

    `resource.getrusage` has no such way, and a child's figure there begins at the peak of its parent.
    """
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    """Bytes of memory of this process: `VmRSS`, what is in use, or `VmHWM`, its peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
