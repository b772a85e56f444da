"""Routed sum of low-rank experts as two GEMMs over all experts at once.

    h = x A_all^T            (T, R), R = E * r
    h_e = act(h_e) * G_e               zero where a token does not use expert e
    y = base + s * h B_all   added in place on the frozen layer's fresh output

Exact for dense and sparse gates alike: static shapes, no sort, every parameter used in every step. The gradient of the
gates is a dot product in rank space, so nothing of size tokens x experts x width is made or saved; and what is saved
besides x is h and G, as h * G is made again in the backward pass (plain operators serve a few rows faster).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..types import Routing
from .dtypes import autocast_is_off, autocast_is_on, compute_dtype, outside_autocast, product_dtype
from .project import keeps_a_graph, project, worth_a_function


def combine_experts(
    h_TR: torch.Tensor,
    base_out_TO: torch.Tensor,
    B: torch.Tensor,
    gates_TE: torch.Tensor | None,
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
        gates_TE: (T, E) combine weights; None where all are one.
        scaling: s, the factor of the routed sum.
        act: Elementwise function of the down projections; None for the identity.
        in_place: Whether `base_out_TO` may be overwritten.

    Returns:
        (T, O) in the dtype of `base_out_TO`.
    """
    h_TR = h_TR if act is None else act(h_TR)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # What is written in place must not be a view, whose graph a Function cannot rebase.
        in_place = in_place and not base_out_TO._is_view()
        if worth_a_function(h_TR) and keeps_a_graph(*((h_TR, B) if gates_TE is None else (h_TR, B, gates_TE))):
            out: torch.Tensor = _Combine.apply(base_out_TO, h_TR, gates_TE, B, scaling, in_place)
            return out
    return _combined(base_out_TO, h_TR, gates_TE, B, scaling, in_place)


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
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Add the weighted output of every expert; arguments as in `eager_experts`, and what to compute in, or None."""
    h_TR = project(x_TD, A.reshape(-1, A.shape[-1]), dtype=dtype)
    return combine_experts(h_TR, base_out_TO, B, routing.gate_matrix(), scaling=scaling, act=act, in_place=in_place)


def add_gated(
    x_TD: torch.Tensor,
    base_out_TO: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    gates_TE: torch.Tensor,
    *,
    scaling: float,
    act: Callable[[torch.Tensor], torch.Tensor] | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """The sum by gates alone; without gradients and casts, as where a token is decoded, in the fewest operators.

    Args:
        x_TD: (T, D) input.
        base_out_TO: (T, O) output of the frozen layer.
        A: (E, r, D) down matrices.
        B: (E, r, O) up matrices, stored transposed.
        gates_TE: (T, E) combine weights.
        scaling: s, the factor of the routed sum.
        act: Elementwise function of the down projections; None for the identity.
        in_place: Whether `base_out_TO` may be overwritten.

    Returns:
        (T, O) in the dtype of `base_out_TO`.
    """
    num_experts, r, width = A.shape
    h_TR = project(x_TD, A.reshape(-1, width), dtype=compute_dtype(x_TD))
    same = h_TR.dtype == gates_TE.dtype == B.dtype == base_out_TO.dtype == product_dtype(h_TR)
    if not same or torch.is_grad_enabled() or not autocast_is_off():
        return combine_experts(h_TR, base_out_TO, B, gates_TE, scaling=scaling, act=act, in_place=in_place)
    h_TR = h_TR if act is None else act(h_TR).view_as(h_TR)
    h_TR.view(-1, num_experts, r).mul_(gates_TE.unsqueeze(-1))
    B_RO = B.reshape(num_experts * r, -1)
    if in_place:
        return base_out_TO.addmm_(h_TR, B_RO, alpha=scaling)
    return torch.addmm(base_out_TO, h_TR, B_RO, alpha=scaling)


def _gated(h_TR: torch.Tensor, gates_TE: torch.Tensor | None) -> torch.Tensor:
    if gates_TE is None:
        return h_TR
    (num_tokens, ranks), num_experts = h_TR.shape, gates_TE.shape[-1]
    by_expert_TEr = h_TR.view(num_tokens, num_experts, ranks // num_experts)
    gates_TE = gates_TE if gates_TE.dtype == h_TR.dtype else gates_TE.to(h_TR.dtype)
    return (by_expert_TEr * gates_TE.unsqueeze(-1)).reshape(num_tokens, ranks)


def _combined(
    base_out_TO: torch.Tensor,
    h_TR: torch.Tensor,
    gates_TE: torch.Tensor | None,
    B: torch.Tensor,
    scaling: float,
    in_place: bool,
) -> torch.Tensor:
    dtype = product_dtype(h_TR)
    gated_TR, B_RO = _gated(h_TR, gates_TE), B.reshape(-1, B.shape[-1])
    if not gated_TR.dtype == B_RO.dtype == dtype:  # a cast to the same dtype costs host time too
        gated_TR, B_RO = gated_TR.to(dtype), B_RO.to(dtype)
    if base_out_TO.dtype == dtype and in_place:
        return base_out_TO.addmm_(gated_TR, B_RO, alpha=scaling)  # in place, autocast has no say
    if base_out_TO.dtype == dtype and (autocast_is_off() or not autocast_is_on(h_TR.device.type)):
        return torch.addmm(base_out_TO, gated_TR, B_RO, alpha=scaling)
    with outside_autocast(h_TR.device.type):
        if base_out_TO.dtype == dtype:
            return torch.addmm(base_out_TO, gated_TR, B_RO, alpha=scaling)
        y_TO = (scaling * (gated_TR @ B_RO)).to(base_out_TO.dtype)
        return base_out_TO.add_(y_TO) if in_place else base_out_TO + y_TO


class _Combine(torch.autograd.Function):
    """base + s (h * G) B, which keeps h, G and B as they came."""

    @staticmethod
    def forward(
        ctx: Any,
        base_out: torch.Tensor,
        h: torch.Tensor,
        gates: torch.Tensor | None,
        B: torch.Tensor,
        scaling: float,
        in_place: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(h, gates, B)
        ctx.scaling = scaling
        out = _combined(base_out, h, gates, B, scaling, in_place)
        if out is base_out:
            ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h_TR, gates_TE, B = ctx.saved_tensors
        (gradient_TO,) = gradients
        needs_base, needs_h, needs_gates, needs_B, *_ = ctx.needs_input_grad
        of_h = of_gates = of_B = None
        with outside_autocast(h_TR.device.type):
            scaled_TO = gradient_TO.to(h_TR.dtype)
            if needs_h or needs_gates:
                B_RO = B.reshape(-1, B.shape[-1]).to(h_TR.dtype)
                of_gated_TR = (scaled_TO @ B_RO.T) * ctx.scaling
                of_h = _gated(of_gated_TR, gates_TE) if needs_h else None
            if needs_gates:
                of_gates = (of_gated_TR * h_TR).unflatten(-1, (gates_TE.shape[-1], -1)).sum(-1).to(gates_TE.dtype)
            if needs_B:
                of_B = ((_gated(h_TR, gates_TE).T @ scaled_TO) * ctx.scaling).view(B.shape).to(B.dtype)
        return gradient_TO if needs_base else None, of_h, of_gates, of_B, None, None
