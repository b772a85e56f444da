"""The linear scorer behind the experts' shared down matrix: z = W A x (CoMoL, arXiv 2603.00573).

It reads r numbers of a token instead of D. Dropout on the experts' input does not reach the scores.
"""

from __future__ import annotations

import torch

from ..types import TokenContext
from .gates import Gate
from .linear import LinearRouter
from .selector import Selector


class LowSpaceRouter(LinearRouter):
    """Scores the experts by a matrix on what their common down matrix makes of the input.

    Args:
        in_features: Taken for the signature that scorers share.
        num_experts: E.
        r: Rank of the down matrix.
        select: See `Router`.
        gate: See `Router`.
        routed_scaling_factor: See `Router`.
        router_jitter_noise: See `LinearRouter`.
        expert_dropout: See `Router`.
        init_std: See `LinearRouter`.

    Attributes:
        weight: (num_scores, r).
    """

    fields = (*LinearRouter.fields, "r")
    reads = "activations"
    needs = frozenset({"shared_activations"})

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        r: int,
        select: Selector | None = None,
        gate: Gate | None = None,
        routed_scaling_factor: float = 1.0,
        router_jitter_noise: float = 0.0,
        expert_dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(
            r,
            num_experts,
            select=select,
            gate=gate,
            routed_scaling_factor=routed_scaling_factor,
            router_jitter_noise=router_jitter_noise,
            expert_dropout=expert_dropout,
            init_std=init_std,
        )

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token by (T, 1, r) activations; arguments as in `Router.scores`."""
        return super().scores(x[:, 0], context)
