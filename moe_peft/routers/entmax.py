"""The entmax gate: a softmax whose small probabilities are exactly zero.

    p_e = max(z_e / 2 - tau, 0)^2,   tau such that a token's probabilities sum to one

The 1.5-entmax of Peters, Niculae and Martins (arXiv 1905.05702), between softmax and sparsemax; the gate of
multilinear mixtures of experts (Oldfield et al., arXiv 2402.12550). tau is found by sorting: over the k largest
scores, of mean m and summed squared deviations s, it would be m - sqrt((1 - s) / k), and the right k is the largest
whose last score is above it.
"""

from __future__ import annotations

import torch

from ..types import TokenContext
from .gates import Gate


class Entmax(Gate):
    """Probabilities that sum to one, of some of the experts."""

    sums_to_one = True
    gives = frozenset({"selection"})

    def __call__(self, logits_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Turn scores into probabilities; arguments as in `Gate`."""
        half_TE = logits_TE / 2
        half_TE = half_TE - half_TE.detach().amax(-1, keepdim=True)  # the result is the same for shifted scores
        sorted_TE = half_TE.sort(-1, descending=True).values
        counts_E = torch.arange(1, logits_TE.shape[-1] + 1, device=half_TE.device, dtype=half_TE.dtype)
        mean_TE = sorted_TE.cumsum(-1) / counts_E
        spread_TE = sorted_TE.square().cumsum(-1) - counts_E * mean_TE.square()
        room_TE = (1 - spread_TE) / counts_E
        with torch.no_grad():
            above_TE = mean_TE - room_TE.clamp_min(0).sqrt() <= sorted_TE
            last_T1 = above_TE.sum(-1, keepdim=True) - 1
        # The root of the one that counts alone: elsewhere it may be of zero, without a derivative.
        tau_T1 = mean_TE.gather(-1, last_T1) - room_TE.gather(-1, last_T1).sqrt()
        return (half_TE - tau_T1).relu().square()
