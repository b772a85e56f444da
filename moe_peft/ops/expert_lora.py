"""Fused experts with a low-rank pair on each matrix: LoRA (Hu et al., 2021, arXiv 2106.09685, eq. 3), by expert.

    y = x W_e + s (x A_e') B_e      for W_e the first matrix and the down matrix of expert e

The pairs are applied to activations: no W_e + s A_e' B_e is made. `dense_expert_lora`, which makes them, is the
definition; `expert_lora` sorts the slots by expert and takes one of the ways of `expert_rows`.
"""

from __future__ import annotations

import torch

from .dtypes import autocast_is_on
from .expert_rows import PATHS, choose_path
from .expert_stacks import AdaptedMatrix, FusedExperts


def dense_expert_lora(
    experts: FusedExperts, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The definition: every expert with its pairs added to its matrices, slot by slot.

    Args:
        experts: Matrices, pairs and what stands between them. Dropouts are not applied.
        hidden_TD: (T, D) input.
        index_TK: (T, K) int64 expert of each slot; E or more for a slot without one.
        weights_TK: (T, K) combine weights.

    Returns:
        (T, O).
    """
    first, down = _dense_matrices(experts.first), _dense_matrices(experts.down)
    rows = []
    for x_D, index_K, weights_K in zip(hidden_TD, index_TK.tolist(), weights_TK, strict=True):
        total = x_D.new_zeros(down[0].shape[1])
        for e, w in zip(index_K, weights_K, strict=True):
            if e < experts.num_experts:
                h = experts.gate(_affine(x_D, first[e], experts.first.bias, e)[None])[0]
                y = _affine(h, down[e], experts.down.bias, e)
                total = total + w * (y if experts.norm is None else experts.norm(y[None])[0])
            elif experts.identity_beyond:
                total = total + w * x_D
        rows.append(total)
    return torch.stack(rows) if rows else hidden_TD.new_zeros(0, down[0].shape[1])


def expert_lora(
    experts: FusedExperts,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    path: str | None = None,
) -> torch.Tensor:
    """Run fused experts with their pairs in activation space.

    Every factor takes part in every call with gradients, also where no token reaches its expert.

    Args:
        experts: Matrices, pairs and what stands between them.
        hidden_TD: (..., D) input; T tokens in all.
        index_TK: (T, K) int64 expert of each slot; E or more for a slot without one.
        weights_TK: (T, K) combine weights.
        path: Name of a way of `expert_rows.PATHS`; None chooses by size, dtype and device.

    Returns:
        (..., O) in the dtype of the input.
    """
    device = hidden_TD.device.type
    if not autocast_is_on(device):
        return _run(experts, hidden_TD, index_TK, weights_TK, path)
    # Products in place and grouped ones are outside of autocast: all compute in the dtype of the matrices.
    with torch.autocast(device, enabled=False):
        return _run(experts, hidden_TD, index_TK, weights_TK, path)


def _run(
    experts: FusedExperts,
    hidden: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    path: str | None,
) -> torch.Tensor:
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    if hidden_TD.shape[0] == 0 or index_TK.shape[-1] == 0:
        return _of_no_slot(experts, hidden)
    first, down = experts.first, experts.down
    last = experts.num_experts - 1
    beyond_TK = index_TK > last
    # A slot without an expert runs the last one with weight zero, so that no shape depends on the routing.
    kept_TK = weights_TK.masked_fill(beyond_TK, 0.0)
    if path is None:
        path = choose_path(index_TK.numel(), first.stack)
    rows = PATHS[path](index_TK.clamp(max=last), experts.num_experts)
    x_ND = rows.take(hidden_TD.to(first.stack.dtype))
    h_NI = experts.gate(rows.linear(x_ND, first)).to(down.stack.dtype)
    y_NO = rows.linear(h_NI, down)
    if experts.norm is not None:
        y_NO = experts.norm(y_NO)
    out_TO = rows.sum_slots(y_NO, kept_TK)
    if experts.identity_beyond:
        out_TO = out_TO + hidden_TD * (weights_TK - kept_TK).sum(-1, keepdim=True)
    return out_TO.to(hidden.dtype).reshape(*hidden.shape[:-1], -1)


def _of_no_slot(experts: FusedExperts, hidden: torch.Tensor) -> torch.Tensor:
    """Zeros that depend on every factor, as data-parallel training expects."""
    bias_free = experts.down.stack
    width = (bias_free.matrix(0) if bias_free.packed else bias_free.matrices()).shape[-1]
    out = hidden.new_zeros(*hidden.shape[:-1], width)
    pairs = [*experts.first.pairs, *experts.down.pairs]
    if torch.is_grad_enabled() and pairs:
        nothing = [factor.flatten()[:0].sum() for own in pairs for factor in (own.A, own.B)]
        out = out + torch.stack([zero.to(out.dtype) for zero in nothing]).sum()
    return out


def _dense_matrices(matrix: AdaptedMatrix) -> list[torch.Tensor]:
    matrices = list(matrix.stack.matrices())
    for own in matrix.pairs:
        for e in range(matrix.stack.num_experts):
            place = own.place(e)
            if place is not None:
                matrices[e] = matrices[e] + own.scaling * own.A[place].T @ own.B[place]
    return matrices


def _affine(x_I: torch.Tensor, matrix_IO: torch.Tensor, bias_EO: torch.Tensor | None, e: int) -> torch.Tensor:
    y_O = x_I @ matrix_IO
    return y_O if bias_EO is None else y_O + bias_EO[e]
