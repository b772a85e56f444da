"""Routing without a router by the size of what an expert makes of the input: z_e = mean of |A_e x| (FlyLoRA).

Zou et al., arXiv 2510.08396, where an expert is one row of A, so that z_e = |a_e x|. With a down matrix that never
trains the scores are fixed from the start.
"""

from __future__ import annotations

import torch

from ..types import TokenContext
from .router import Router


class ActivationAbs(Router):
    """Scores the experts by their activations; arguments as in `Router`."""

    reads = "activations"
    needs = frozenset({"activations"})
    gives = frozenset()

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token by (T, E, r) activations; arguments as in `Router.scores`."""
        return x.to(torch.promote_types(x.dtype, torch.float32)).abs().mean(-1)
