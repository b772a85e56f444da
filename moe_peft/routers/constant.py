"""No routing: every token uses every expert with weight one, so that the experts' outputs are added up."""

from __future__ import annotations

import torch

from ..types import Routing, TokenContext
from .router import Router


class ConstantRouter(Router):
    """A router without parameters or choice (PERFT-D and PERFT-S, arXiv 2508.02587); arguments as in `Router`."""

    fields: tuple[str, ...] = ("routed_scaling_factor",)
    mergeable = True

    @property
    def constant_weight(self) -> float | None:
        """See `Router.constant_weight`; a class with a decision of its own has none."""
        own = type(self)
        plain = own.decide is ConstantRouter.decide and own.forward is Router.forward and own.scale is Router.scale
        return self.routed_scaling_factor if plain else None

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score all experts alike; arguments as in `Router.scores`."""
        return x.new_zeros(x.shape[0], self.num_experts, dtype=torch.promote_types(x.dtype, torch.float32))

    def decide(self, logits_TE: torch.Tensor, context: TokenContext) -> Routing:
        """Give every expert the same weight; arguments as in `Router.decide`."""
        ones_TE = torch.ones_like(logits_TE)
        return Routing(
            weights=self.scale(ones_TE),
            experts=None,
            logits=logits_TE,
            probs=ones_TE / self.num_experts,
            context=context,
        )
