"""Routed sum of low-rank experts with the slots sorted by expert: each expert computes its own tokens and no others.

    y_t = base_t + s * sum_k w_tk B_{i_tk}' act(A_{i_tk} x_t)        slots in the order of i

`grouped` multiplies all experts' rows in one grouped product, ranks padded to what it takes, and works with fixed
shapes; `segment` makes a product for each expert that has rows, and reads their number, so that it waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..types import Routing
from .dtypes import outside_autocast
from .grouped import grouped_mm, padded_rank
from .slots import slots_of

# (rows, matrices, ends of the groups) -> products
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _sorted_experts(
    x_TD: torch.Tensor,
    base_out_TO: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    routing: Routing,
    *,
    scaling: float,
    product: Product,
    act: Callable[[torch.Tensor], torch.Tensor] | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """Add the weighted output of the selected experts to the base output; arguments as in `eager_experts`."""
    index_TK, weights_TK = slots_of(routing)
    num_experts = A.shape[0]
    experts_N, order_N = torch.sort(index_TK.reshape(-1), stable=True)
    counted_E = torch.arange(num_experts, device=experts_N.device)
    ends_E = torch.searchsorted(experts_N, counted_E, right=True, out_int32=True)
    tokens_N = order_N // index_TK.shape[1]
    with outside_autocast(x_TD.device.type):
        A, B = padded_rank(A.to(x_TD.dtype), B.to(x_TD.dtype))
        h_Nr = product(x_TD.index_select(0, tokens_N), A.transpose(1, 2), ends_E)
        if act is not None:
            # A padded rank is zero before the activation; what it becomes meets rows of zeros.
            h_Nr = act(h_Nr)
        h_Nr = h_Nr * (scaling * weights_TK.reshape(-1)[order_N]).to(h_Nr.dtype)[:, None]
        y_NO = product(h_Nr, B, ends_E).to(base_out_TO.dtype)
    return base_out_TO.index_add_(0, tokens_N, y_NO) if in_place else base_out_TO.index_add(0, tokens_N, y_NO)


def _segments(x_NI: torch.Tensor, matrices_GIO: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.moe_peft.segment_mm(x_NI, matrices_GIO, ends_G)
    return out


grouped_experts = partial(_sorted_experts, product=grouped_mm)
segment_experts = partial(_sorted_experts, product=_segments)
