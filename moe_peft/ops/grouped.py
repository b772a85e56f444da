"""Grouped products: rows sorted by group, each group times a matrix of its own.

`torch.nn.functional.grouped_mm` wherever it takes the operands, else a loop over the groups behind an operator, so
that compiled graphs need not look into it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Bytes to which torch's grouped product wants every row aligned.
ALIGNMENT = 16


def grouped_mm(x_NI: torch.Tensor, matrices_GIO: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """Multiply sorted rows by the matrices of their groups.

    Args:
        x_NI: (N, I) rows, those of a group side by side.
        matrices_GIO: (G, I, O) of the same dtype.
        ends_G: (G,) int32, where each group's rows end; the last is N.

    Returns:
        (N, O).
    """
    matrices_GIO = in_rows(matrices_GIO)
    if _takes(x_NI, matrices_GIO):
        return F.grouped_mm(x_NI.contiguous(), matrices_GIO, offs=ends_G)
    return torch.ops.moe_peft.segment_mm(x_NI, matrices_GIO, ends_G)


def in_rows(matrices_GIO: torch.Tensor) -> torch.Tensor:
    """Matrices whose rows or columns lie side by side in memory, copied only where they do not.

    Where it is the groups that do, as in stock peft's packing of up matrices, the copy is one transposition of a
    matrix, which torch makes in blocks; its gradient too.

    Args:
        matrices_GIO: (G, I, O).
    """
    if 1 in matrices_GIO.stride()[1:]:
        return matrices_GIO
    packed_OIG = matrices_GIO.permute(2, 1, 0)
    if not packed_OIG.is_contiguous():
        return matrices_GIO.contiguous()
    groups, rows, columns = matrices_GIO.shape
    return packed_OIG.flatten(1).t().contiguous().view(rows, groups, columns).transpose(0, 1)


def padded_rank(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill low-rank pairs up with zero ranks to rows as torch's grouped product wants them aligned.

    Args:
        A: (n, r, I).
        B: (n, r, O).

    Returns:
        (n, r', I) and (n, r', O), r' >= r; the product of a pair is the same.
    """
    missing = -A.shape[1] % (ALIGNMENT // A.element_size())
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, 0, 0, missing))) if missing else (A, B)


def _takes(x_NI: torch.Tensor, matrices_GIO: torch.Tensor) -> bool:
    """Whether torch's grouped product takes the operands, with their gradients."""
    if x_NI.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if torch.compiler.is_compiling() and x_NI.dtype != torch.bfloat16:
        return False
    return all(size * x_NI.element_size() % ALIGNMENT == 0 for size in matrices_GIO.shape[1:])


@torch.library.custom_op("moe_peft::segment_mm", mutates_args=())
def segment_mm(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """A loop over the groups; arguments as in `grouped_mm`."""
    out = x.new_zeros(x.shape[0], matrices.shape[2])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = x[start:end] @ matrices[group]
        start = end
    return out


@torch.library.custom_op("moe_peft::segment_outer", mutates_args=())
def segment_outer(x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The gradient of `segment_mm` with respect to its matrices: x' g of each group, (G, I, O)."""
    out = x.new_zeros(ends.shape[0], x.shape[1], gradient.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            out[group] = x[start:end].T @ gradient[start:end]
        start = end
    return out


@segment_mm.register_fake
def _segment_mm_shape(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], matrices.shape[2])


@segment_outer.register_fake
def _segment_outer_shape(x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], gradient.shape[1])


def _keep(ctx, inputs, output) -> None:
    x, matrices, ends = inputs
    needs_x, needs_matrices = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_matrices else None, matrices if needs_x else None, ends)


def _gradients(ctx, gradient):
    x, matrices, ends = ctx.saved_tensors
    of_x = None if matrices is None else segment_mm(gradient, matrices.transpose(1, 2), ends)
    return of_x, None if x is None else segment_outer(x, gradient, ends), None


torch.library.register_autograd("moe_peft::segment_mm", _gradients, setup_context=_keep)
