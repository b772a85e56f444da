"""Products of one input with several matrices, which keep nothing but the input and the matrices for the backward.

    y = x [W_1; ...; W_n]'        (T, rows of all)

Input and matrices may come in other dtypes than they are computed with, as the input of a router's float32 scores in
a 16-bit model. What is cast or joined is made again in the backward pass instead of kept: the gradients are the same,
bit for bit, and no copy of the (tokens x width) input lives until then. A few rows are left to plain operators, whose
host time is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..forward.shared_cast import shared_cast
from .choice import FEW_ROWS
from .dtypes import autocast_is_off, autocast_is_on, outside_autocast, product_dtype


def project(x_TD: torch.Tensor, *weights: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Apply several matrices that read the same input in one GEMM.

    Args:
        x_TD: (T, D) input.
        *weights: (rows, D) matrices.
        dtype: Compute dtype, that of the result; None takes the input's.

    Returns:
        (T, sum of rows).
    """
    own = x_TD.dtype
    dtype = dtype or own
    if own == dtype and len(weights) == 1 and weights[0].dtype == dtype:
        if autocast_is_off() or not autocast_is_on(x_TD.device.type):
            return F.linear(x_TD, weights[0])
    elif keeps_a_graph(x_TD, *weights) and worth_a_function(x_TD):
        product: torch.Tensor = _Project.apply(x_TD, dtype, *weights)
        return product
    return _product(x_TD, _joined(weights, dtype), dtype)


def worth_a_function(x: torch.Tensor) -> bool:
    """Whether what is kept of an input is worth making again.

    Few rows are not; but under autocast, which may round a backward pass too, and where products widen what they read.

    Args:
        x: (..., D) of any leading shape. A compiled graph is not to ask, as it is to hold for any number of rows.
    """
    if x.numel() > FEW_ROWS * x.shape[-1] or product_dtype(x) != x.dtype:
        return True
    return not autocast_is_off() and autocast_is_on(x.device.type)


def keeps_a_graph(*tensors: torch.Tensor) -> bool:
    """Whether what is computed of some tensors is kept for a backward pass by autograd itself.

    A compiler decides on its own what to keep, and torch.func's transforms look into plain operators alone.

    Args:
        *tensors: What is computed with.
    """
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _joined(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return (weights[0] if len(weights) == 1 else torch.cat(tuple(weights))).to(dtype)


def _product(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with outside_autocast(x.device.type):
        return F.linear(x.to(dtype), weight)


class _Project(torch.autograd.Function):
    """x [W_1; ...; W_n]' of x cast to another dtype."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.dtype = dtype
        return _product(shared_cast(x, dtype), _joined(weights, dtype), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        (gradient,) = gradients
        needs_x, _, *needs = ctx.needs_input_grad
        of_x, of_weights = None, [None] * len(weights)
        with outside_autocast(x.device.type):
            if needs_x:
                of_x = (gradient @ _joined(weights, ctx.dtype)).to(x.dtype)
            if any(needs):
                rows_TR = gradient.reshape(-1, gradient.shape[-1])
                x_TD = shared_cast(x, ctx.dtype).reshape(-1, x.shape[-1])
                parts = (rows_TR.T @ x_TD).split([weight.shape[0] for weight in weights])
                of_weights = [
                    part.to(weight.dtype) if need else None
                    for part, weight, need in zip(parts, weights, needs, strict=True)
                ]
        return of_x, None, *of_weights
