"""Slow float64 references of PERFT: Python loops over tokens and experts, nothing shared with the package.

Matrices have the layout of the formulas: A (N, r, D) and B (N, D, r); a backbone's experts are gate_up (E, 2I, D), the
gate's rows first, and down (E, D, I).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.reference import Gates


def identity(h: torch.Tensor) -> torch.Tensor:
    return h


def silu(h: torch.Tensor) -> torch.Tensor:
    return h / (1 + torch.exp(-h))


def adapter(h: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, act: Callable) -> torch.Tensor:
    """a_i(h) = s B_i act(A_i h) of one token."""
    return scaling * (B @ act(A @ h))


def beside(
    block_out: torch.Tensor, x: torch.Tensor, A, B, gates: Gates, *, scaling: float, act: Callable = identity
) -> torch.Tensor:
    """y_t = block(x)_t + sum_j g_tj a_j(x_t), the variants R, D and S."""
    rows = []
    for t in range(x.shape[0]):
        y = block_out[t]
        for j, gate in gates[t].items():
            y = y + gate * adapter(x[t], A[j], B[j], scaling, act)
        rows.append(y)
    return torch.stack(rows)


def embedded(
    x: torch.Tensor, gate_up, down, A, B, gates: Gates, *, scaling: float, act: Callable = identity
) -> torch.Tensor:
    """y_t = sum_k w_tk (FFN_k(x_t) + a_k(x_t)), the adapter inside of the backbone's expert."""
    width = down.shape[2]
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for i, weight in gates[t].items():
            h = gate_up[i] @ x[t]
            ffn = down[i] @ (silu(h[:width]) * h[width:])
            y = y + weight * (ffn + adapter(x[t], A[i], B[i], scaling, act))
        rows.append(y)
    return torch.stack(rows)
