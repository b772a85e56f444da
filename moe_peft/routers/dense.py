"""Dense (soft) routing: every token uses every expert, weighted by its probability."""

from __future__ import annotations

from typing import Any

import torch

from ..types import Routing, TokenContext
from .linear import LinearRouter
from .selector import Selector


class Dense(Selector):
    """All experts (LoRAMoE, arXiv 2312.09979; MoLORA, arXiv 2309.05444)."""

    constant_for_one = True

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Weigh every expert by its probability; arguments as in `Selector`."""
        return Routing(weights=probs_TE, experts=None, logits=logits_TE, probs=probs_TE, context=context)


class DenseRouter(LinearRouter):
    """Linear scores, softmax, all experts.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        **settings: Further arguments of `LinearRouter`.
    """

    def __init__(self, in_features: int, num_experts: int, **settings: Any) -> None:
        super().__init__(in_features, num_experts, select=Dense(), **settings)
