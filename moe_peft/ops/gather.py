"""Routed sum of low-rank experts for few slots: the matrices of each are copied, and multiplied in one batch.

    y_t = base_t + s * sum_k w_tk B_{i_tk}' act(A_{i_tk} x_t)

For a token that is decoded this reads K pairs instead of E, with fixed shapes and without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..types import Routing
from .dtypes import outside_autocast
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
        B_TXO = B.index_select(0, flat_N).to(x_TD.dtype).view(num_tokens, num_slots * r, out_features)
        h_TX = torch.bmm(A_TXD, x_TD[..., None]).squeeze(-1)
        h_TX = h_TX if act is None else act(h_TX)
        gates_TX = (scaling * weights_TK).to(h_TX.dtype).repeat_interleave(r, dim=1)
        y_TO = torch.bmm((h_TX * gates_TX)[:, None], B_TXO).squeeze(1).to(base_out_TO.dtype)
    return base_out_TO.add_(y_TO) if in_place else base_out_TO + y_TO
