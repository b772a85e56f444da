"""When experts and router may be computed in one GEMM on their input, without calling either module."""

from __future__ import annotations

import torch
from torch import nn

from ..experts import Experts
from ..ops import compute_dtype, joins
from ..routers import Router
from ..types import TokenContext
from .expert_pass import hooks_of_all_modules


def shared_rows(
    router: Router, bank: Experts, x_TD: torch.Tensor, context: TokenContext
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows of experts and router that one GEMM on x may compute without calling either module.

    Both read the same input in this pass, in one dtype that holds float32 scores, and nothing of what a call does
    would be missed: hooks, weights that arrive when their module is called, a forward of somebody else's. For few rows
    two products cost less than joining the matrices.
    """
    if not joins(x_TD.shape[0]) or compute_dtype(x_TD).itemsize < 4:
        return None
    if not (is_plain(router) and is_plain(bank)):
        return None
    if bank.implementation(x_TD.shape[0], router.num_slots) not in (None, "dense"):
        return None
    weight, rows = router.shared_rows(context), bank.shared_rows(context)
    if weight is None or rows is None or not x_TD.dtype == weight.dtype == rows.dtype:
        return None
    return rows, weight


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else, on weights that are there."""
    own = vars(module)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not (
        any(hooks)
        or any(hooks_of_all_modules())
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or any(p.is_meta for p in module._parameters.values() if p is not None)
    )
