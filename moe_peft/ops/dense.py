"""Routed sum of low-rank experts as two GEMMs over all experts at once.

    h = x A_all^T            (T, R), R = E * r
    h_e = act(h_e) * G_e               zero where a token does not use expert e
    y = base + s * h B_all   added in place on the frozen layer's fresh output

Exact for dense and sparse gates alike: static shapes, no sort, every parameter used in every step. The gradient of the
gates is a dot product in rank space, so nothing of size tokens x experts x width is made or saved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..types import Routing


def project(x_TD: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """Apply several matrices that read the same input in one GEMM.

    Args:
        x_TD: (T, D) input; its dtype is the compute dtype.
        *weights: (rows, D) matrices.

    Returns:
        (T, sum of rows).
    """
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD, weight.to(x_TD.dtype))


def combine_experts(
    h_TR: torch.Tensor,
    base_out_TO: torch.Tensor,
    B: torch.Tensor,
    gates_TE: torch.Tensor,
    *,
    scaling: float,
    act: Callable[[torch.Tensor], torch.Tensor] | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """Weigh each expert's columns by its gate and add the up projection to the base output.

    Args:
        h_TR: (T, E * r) down projections of all experts.
        base_out_TO: (T, O) output of the frozen layer.
        B: (E, r, O) up matrices, stored transposed.
        gates_TE: (T, E) combine weights.
        scaling: s, the factor of the routed sum.
        act: Elementwise function of the down projections; None for the identity.
        in_place: Whether `base_out_TO` may be overwritten.

    Returns:
        (T, O) in the dtype of `base_out_TO`.
    """
    num_experts, r, out_features = B.shape
    h_TR = h_TR if act is None else act(h_TR)
    gated_TER = h_TR.view(-1, num_experts, r) * gates_TE.to(h_TR.dtype).unsqueeze(-1)
    gated_TR = gated_TER.reshape(-1, num_experts * r)
    B_RO = B.reshape(-1, out_features).to(h_TR.dtype)
    with torch.autocast(h_TR.device.type, enabled=False):
        if base_out_TO.dtype != h_TR.dtype:
            return base_out_TO + (scaling * (gated_TR @ B_RO)).to(base_out_TO.dtype)
        if in_place:
            return base_out_TO.addmm_(gated_TR, B_RO, alpha=scaling)
        return torch.addmm(base_out_TO, gated_TR, B_RO, alpha=scaling)


def dense_experts(
    x_TD: torch.Tensor,
    base_out_TO: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    routing: Routing,
    *,
    scaling: float,
    act: Callable[[torch.Tensor], torch.Tensor] | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """Add the weighted output of every expert to the base output; arguments as in `eager_experts`.

    Args:
        x_TD: (T, D) input.
        base_out_TO: (T, O) output of the frozen layer.
        A: (E, r, D) down matrices.
        B: (E, r, O) up matrices, stored transposed.
        routing: Decision for the T tokens.
        scaling: s, the factor of the routed sum.
        act: Elementwise function of the down projections; None for the identity.
        in_place: Whether `base_out_TO` may be overwritten.

    Returns:
        (T, O) in the dtype of `base_out_TO`.
    """
    h_TR = project(x_TD, A.reshape(-1, A.shape[-1]))
    return combine_experts(h_TR, base_out_TO, B, routing.gate_matrix(), scaling=scaling, act=act, in_place=in_place)
