"""The mean of what an expert's down matrix makes of the input is its score: z_e = mean over r of (A_e x)_r.

Avg-K (Liu et al., arXiv 2305.13999): an expert is as near to a token as the mean of its keys. No parameter is added,
and the paper needs no balance loss. Dropout on the experts' input does not reach the scores.
"""

from __future__ import annotations

import torch

from ..types import TokenContext
from .router import Router


class MeanActivation(Router):
    """Scores by the experts' down matrices, which the task and the router losses train; arguments as in `Router`."""

    reads = "activations"
    gives = frozenset()
    needs = frozenset({"activations"})

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token by (T, E, r) activations; arguments as in `Router.scores`."""
        return x.to(torch.promote_types(x.dtype, torch.float32)).mean(-1)
