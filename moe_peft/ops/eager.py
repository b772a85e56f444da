"""Routed sum of low-rank experts, one expert after the other: the definition.

    y_t = base_t + s * sum_e G_te * B_e^T act(A_e x_t)        A_e (r, D), B_e (r, O) stored transposed

Every other implementation must agree with this one, forward and gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..types import Routing
from .dtypes import outside_autocast


def eager_experts(
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
    """Add the weighted output of every expert to the base output.

    Args:
        x_TD: (T, D) input.
        base_out_TO: (T, O) output of the frozen layer.
        A: (E, r, D) down matrices.
        B: (E, r, O) up matrices, stored transposed.
        routing: Decision for the T tokens.
        scaling: s, the factor of the routed sum.
        act: Elementwise function of the down projections; None for the identity.
        in_place: Whether `base_out_TO` may be overwritten; here the sum is out of place all the same.

    Returns:
        (T, O) in the dtype of `base_out_TO`.
    """
    gates_TE = routing.gate_matrix().to(x_TD.dtype)
    delta_TO = x_TD.new_zeros(base_out_TO.shape)
    with outside_autocast(x_TD.device.type):
        for e in range(A.shape[0]):
            h_Tr = x_TD @ A[e].to(x_TD.dtype).T
            h_Tr = h_Tr if act is None else act(h_Tr)
            delta_TO = delta_TO + gates_TE[:, e : e + 1] * (h_Tr @ B[e].to(x_TD.dtype))
    return base_out_TO + (scaling * delta_TO).to(base_out_TO.dtype)
