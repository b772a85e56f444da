"""The dtype an adapter computes in, that of its input or autocast's; and weights that are never rounded to 16 bit."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def cast_to_compute_dtype(x: torch.Tensor) -> torch.Tensor:
    """Bring an input to the dtype of the adapter's GEMMs.

    The weights are cast to this dtype, never x to theirs: x is large and the weights are small.

    Args:
        x: Input of any shape.

    Returns:
        x itself, or x in autocast's dtype where autocast is on for its device.
    """
    return x.to(compute_dtype(x))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the adapter's GEMMs: that of their input, or autocast's where it is on for its device.

    Args:
        x: Input of any shape.
    """
    device = x.device.type
    if autocast_is_on(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for a device; the meta device, on which a dry run passes, knows of none.

    Args:
        device_type: As "cpu" or "cuda".
    """
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def outside_autocast(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off on a device; entering one costs 50 us of host time, so only where it is on.

    Args:
        device_type: As "cpu" or "cuda".
    """
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def without_rounding(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Let a module's weight follow a change of device or dtype, but never one to 16 bit or less.

    Args:
        before: The weight.
        after: What a function of the module made of it, as `module.to(...)` does.

    Returns:
        after, or before on the device of after where that is narrower than float32.
    """
    if after.is_floating_point() and after.dtype.itemsize < min(before.dtype.itemsize, 4):
        return before.to(after.device)
    return after
