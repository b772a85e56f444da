"""The dtype an adapter computes in, that of its input or autocast's; and weights that are never rounded to 16 bit."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def _fast_on_cpu(name: str) -> bool:
    """Whether this machine's CPU multiplies matrices of a 16-bit dtype as a library does."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


# 16-bit dtypes whose products of rows with matrices stored row by row take some fifty times the time of float32 here.
SLOW_ON_CPU = tuple(
    dtype for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")) if not _fast_on_cpu(name)
)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What a product of rows with a matrix stored row by row is best computed in: the rows' dtype, or a wider one.

    Args:
        tensor: The rows.
    """
    if tensor.dtype in SLOW_ON_CPU and tensor.device.type == "cpu":
        return torch.float32
    return tensor.dtype


def cast_to_compute_dtype(x: torch.Tensor) -> torch.Tensor:
    """Bring an input to the dtype of the adapter's GEMMs.

    The weights are cast to this dtype, never x to theirs: x is large and the weights are small.

    Args:
        x: Input of any shape.

    Returns:
        x itself, or x in autocast's dtype where autocast is on for its device.
    """
    return x if autocast_is_off() else x.to(compute_dtype(x))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the adapter's GEMMs: that of their input, or autocast's where it is on for its device.

    Args:
        x: Input of any shape.
    """
    if autocast_is_off():
        return x.dtype
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


def autocast_is_off() -> bool:
    """Whether autocast is on for no device at all: one look, where asking for a tensor's device costs three."""
    return not torch._C._is_any_autocast_enabled()


def outside_autocast(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off on a device; entering one costs 50 us of host time, so only where it is on.

    Args:
        device_type: As "cpu" or "cuda".
    """
    if not autocast_is_off() and autocast_is_on(device_type):
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
