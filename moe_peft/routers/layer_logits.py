"""One score for each expert at a place, whatever the token: z = w (Mixture-of-Linguistic-Experts, arXiv 2310.16240).

All tokens use the experts alike, so that the adapter merges into the weights once training is over.
"""

from __future__ import annotations

import torch
from torch import nn

from ..types import TokenContext
from .gates import Gate
from .router import Router
from .selector import Selector


class LayerLogits(Router):
    """Learned scores of a place.

    Args:
        in_features: Taken for the signature that scorers share.
        num_experts: E.
        select: See `Router`.
        gate: See `Router`.
        routed_scaling_factor: See `Router`.
        expert_dropout: See `Router`.
        init_std: Standard deviation of the scores at the start; None takes 1e-3.

    Attributes:
        weight: (num_scores,) the scores.
    """

    gives = frozenset()  # with null experts a place could choose nothing for every token, and never learn again
    learns = True
    mergeable = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        select: Selector | None = None,
        gate: Gate | None = None,
        routed_scaling_factor: float = 1.0,
        expert_dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_experts,
            select=select,
            gate=gate,
            routed_scaling_factor=routed_scaling_factor,
            expert_dropout=expert_dropout,
        )
        self.weight = nn.Parameter(torch.empty(self.num_scores))
        nn.init.normal_(self.weight, std=1e-3 if init_std is None else init_std)

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Give every token the same scores; arguments as in `Router.scores`."""
        return self.weight.to(torch.promote_types(x.dtype, torch.float32)).expand(x.shape[0], -1)
