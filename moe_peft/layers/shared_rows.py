"""When the matrices of experts and router may be read for their products with the input, without calling either."""

from __future__ import annotations

import torch
from torch import nn

from ..experts import Experts
from ..ops import compute_dtype, project
from ..routers import Router
from ..types import TokenContext
from .expert_pass import all_modules_are_hooked


def shared_rows(
    router: Router, bank: Experts, x_TD: torch.Tensor, context: TokenContext
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows of experts and router whose products with x are all that either computes of it in this pass.

    Both read the same input, in one dtype that holds float32 scores, and nothing of what a call does would be missed:
    hooks, weights that arrive when their module is called, a forward of somebody else's.
    """
    if compute_dtype(x_TD).itemsize < 4:
        return None
    if not is_plain(router, bank):
        return None
    if bank.implementation(x_TD.shape[0], router.num_slots) not in (None, "dense"):
        return None
    weight, rows = router.shared_rows(context), bank.shared_rows(context)
    if weight is None or rows is None or not x_TD.dtype == weight.dtype == rows.dtype:
        return None
    return rows, weight


def is_plain(*modules: nn.Module) -> bool:
    """Whether calling modules runs their classes' forwards and nothing else, on weights that are there.

    Args:
        *modules: Any; in every forward of every place, so that each look is one at a dictionary.
    """
    if all_modules_are_hooked():
        return False
    for module in modules:
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if "forward" in own or own.get("_compiled_call_impl") is not None:
            return False
        for parameter in own["_parameters"].values():
            if parameter is not None and parameter.is_meta:
                return False
    return True


def products(x_TD: torch.Tensor, rows_RD: torch.Tensor, weight_ED: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What experts and router make of an input, in one GEMM.

    Args:
        x_TD: (T, D) input.
        rows_RD: (R, D) down matrices of the experts.
        weight_ED: (E, D) matrix of the router.

    Returns:
        (T, R) and (T, E).
    """
    h_TR, logits_TE = project(x_TD, rows_RD, weight_ED).split([rows_RD.shape[0], weight_ED.shape[0]], dim=-1)
    return h_TR, logits_TE
