"""How much each of several maps answers, on average over its outputs, without keeping an output.

    m_te = mean over o of softplus((h_te B_e)_o)        (T, E)

Outputs are made in slices of their width and again in the backward pass, so that the (T, E, O) outputs of all maps
never stand together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .dtypes import outside_autocast
from .project import keeps_a_graph

# Outputs of a map that are computed together.
WIDTH = 512


def mean_softplus(h_TEr: torch.Tensor, B_ErO: torch.Tensor) -> torch.Tensor:
    """The mean softplus of each map's outputs.

    Args:
        h_TEr: (T, E, r) inputs of the maps.
        B_ErO: (E, r, O) the maps.

    Returns:
        (T, E), float32 or wider, above zero.
    """
    dtype = torch.promote_types(torch.promote_types(h_TEr.dtype, B_ErO.dtype), torch.float32)
    h_ETr, B_ErO = h_TEr.transpose(0, 1).to(dtype), B_ErO.to(dtype)
    if keeps_a_graph(h_ETr, B_ErO):
        mean_ET: torch.Tensor = _MeanSoftplus.apply(h_ETr, B_ErO)
    else:
        mean_ET = _mean(h_ETr, B_ErO)
    return mean_ET.T


def _mean(h_ETr: torch.Tensor, B_ErO: torch.Tensor) -> torch.Tensor:
    with outside_autocast(h_ETr.device.type):
        sums_ET = [F.softplus(h_ETr @ slice_Ero).sum(-1) for slice_Ero in B_ErO.split(WIDTH, dim=-1)]
    return torch.stack(sums_ET).sum(0) / B_ErO.shape[-1]


class _MeanSoftplus(torch.autograd.Function):
    """`_mean`, whose outputs are made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, h_ETr: torch.Tensor, B_ErO: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h_ETr, B_ErO)
        return _mean(h_ETr, B_ErO)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h_ETr, B_ErO = ctx.saved_tensors
        (gradient_ET,) = gradients
        of_h_ETr, of_B = torch.zeros_like(h_ETr), []
        with outside_autocast(h_ETr.device.type):
            for slice_Ero in B_ErO.split(WIDTH, dim=-1):
                of_out_ETo = torch.sigmoid(h_ETr @ slice_Ero) * (gradient_ET[..., None] / B_ErO.shape[-1])
                of_h_ETr = of_h_ETr + of_out_ETo @ slice_Ero.mT
                of_B.append(h_ETr.mT @ of_out_ETo)
        return of_h_ETr, torch.cat(of_B, dim=-1)
