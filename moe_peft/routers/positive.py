"""Every expert whose gate is above zero, with the gate as its weight (ReMoE, Wang et al., arXiv 2412.14711)."""

from __future__ import annotations

import torch

from ..types import Routing, TokenContext
from .selector import Selector


class Positive(Selector):
    """All that a gate leaves; it goes with gates that leave experts out."""

    needs = frozenset({"selection"})

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Weigh every expert by its gate; arguments as in `Selector`."""
        return Routing(weights=probs_TE, experts=None, logits=logits_TE, probs=probs_TE, context=context)
