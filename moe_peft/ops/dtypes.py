"""The dtype an adapter computes in, that of its input or autocast's; and weights that are never rounded to 16 bit."""

from __future__ import annotations

import torch


def cast_to_compute_dtype(x: torch.Tensor) -> torch.Tensor:
    """Bring an input to the dtype of the adapter's GEMMs.

    The weights are cast to this dtype, never x to theirs: x is large and the weights are small.

    Args:
        x: Input of any shape.

    Returns:
        x itself, or x in autocast's dtype where autocast is on for its device.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


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
