"""No routing: every token uses every expert with weight one, so that the experts' outputs are added up."""

from __future__ import annotations

import torch

from ..types import Routing, TokenContext
from .router import Router


class ConstantRouter(Router):
    """A router without parameters or choice (PERFT-D and PERFT-S, arXiv 2508.02587); arguments as in `Router`."""

    mergeable = True

    def forward(self, x_TD: torch.Tensor, context: TokenContext) -> Routing:
        """Give every expert the same weight; arguments as in `Router.forward`."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        ones_TE = torch.ones(x_TD.shape[0], self.num_experts, dtype=dtype, device=x_TD.device)
        return Routing(
            weights=self.scale(ones_TE),
            experts=None,
            logits=torch.zeros_like(ones_TE),
            probs=ones_TE / self.num_experts,
            context=context,
        )
