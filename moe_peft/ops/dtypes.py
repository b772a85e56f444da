"""The dtype an adapter computes in: that of its input, or autocast's where autocast is on."""

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
