"""Sums over all processes, in one all-reduce however many tensors there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed as dist


def num_processes() -> int:
    """Number of processes that train together; one outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Add up tensors of all processes.

    Args:
        tensors: 1-d tensors of floating point, of the same number, sizes and order on every process.

    Returns:
        The sums, each with the dtype and on the device of its tensor; float64 where any is, else float32 in between.
    """
    if not tensors or num_processes() == 1:
        return list(tensors)
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    flat = torch.cat([tensor.to(tensors[0].device, dtype) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.to(tensor) for part, tensor in zip(parts, tensors, strict=True)]
