"""Routed sum of low-rank experts for few slots: the matrices of each are copied, and multiplied in one batch.

    y_t = base_t + s * sum_k w_tk B_{i_tk}' act(A_{i_tk} x_t)

For a token that is decoded this reads K pairs instead of E, with fixed shapes and without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..types import Routing
from .dtypes import outside_autocast, product_dtype
from .slots import slots_of


def gather_experts(
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
    """Add the weighted output of the selected experts to the base output; arguments as in `eager_experts`."""
    index_TK, weights_TK = slots_of(routing)
    num_tokens, num_slots = index_TK.shape
    r, out_features = B.shape[1:]
    flat_N = index_TK.reshape(-1)
    with outside_autocast(x_TD.device.type):
        # The slots of a token side by side: one product down, one product up that adds them.
        A_TXD = A.index_select(0, flat_N).to(x_TD.dtype).view(num_tokens, num_slots * r, A.shape[-1])
        B_TXO = B.index_select(0, flat_N).to(product_dtype(x_TD)).view(num_tokens, num_slots * r, out_features)
        h_TX = torch.bmm(A_TXD, x_TD.unsqueeze(-1)).squeeze(-1)
        h_TX = h_TX if act is None else act(h_TX)
        gated_TKr = h_TX.view(num_tokens, num_slots, r) * weights_TK.to(h_TX.dtype).unsqueeze(-1)
        gated_T1X = gated_TKr.view(num_tokens, 1, num_slots * r).to(B_TXO.dtype)
        if base_out_TO.dtype == B_TXO.dtype and not (in_place and torch.is_grad_enabled()):
            base_T1O = base_out_TO.unsqueeze(1)
            if in_place:
                base_T1O.baddbmm_(gated_T1X, B_TXO, alpha=scaling)
                return base_out_TO
            return torch.baddbmm(base_T1O, gated_T1X, B_TXO, alpha=scaling).squeeze(1)
        y_TO = (scaling * torch.bmm(gated_T1X, B_TXO)).squeeze(1).to(base_out_TO.dtype)
    return base_out_TO.add_(y_TO) if in_place else base_out_TO + y_TO
