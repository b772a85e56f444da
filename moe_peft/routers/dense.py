"""Dense (soft) routing: every token uses every expert, weighted by g = softmax(W x)."""

from __future__ import annotations

import torch

from ..types import Routing, TokenContext
from .router import LinearRouter, gate_probs


class DenseRouter(LinearRouter):
    """Softmax over all experts (LoRAMoE, arXiv 2312.09979; MoLORA, arXiv 2309.05444)."""

    @property
    def mergeable(self) -> bool:
        """The softmax over a single expert is one."""
        return self.num_experts == 1

    def decide(self, logits_TE: torch.Tensor, context: TokenContext) -> Routing:
        """Weigh every expert by its probability; arguments as in `LinearRouter.decide`."""
        probs_TE = gate_probs(logits_TE, self.expert_dropout, context)
        return Routing(weights=self.scale(probs_TE), experts=None, logits=logits_TE, probs=probs_TE, context=context)
