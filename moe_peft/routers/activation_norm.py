"""The norm of what an expert makes of the input is its score: no router, and no parameter of one.

    z_e = |A_e x|

Autonomy-of-Experts (Lv et al., arXiv 2501.13074), which weighs the k largest by a softmax over them, that is
`norm_topk_prob`. Dropout on the experts' input does not reach the scores. The rows of A start with equal norms, so
that no expert wins by its size.
"""

from __future__ import annotations

import torch

from ..types import TokenContext
from .router import Router


class ActivationNorm(Router):
    """Scores by the experts' down matrices, which the task and the router losses train; arguments as in `Router`."""

    reads = "activations"
    gives = frozenset()
    needs = frozenset({"activations"})

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token by (T, E, r) activations; arguments as in `Router.scores`."""
        return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
