"""Dense (soft) routing: every token uses every expert, weighted by g = softmax(W x)."""

from __future__ import annotations

import torch

from ..types import Routing, TokenContext
from .router import Router, gate_probs


class DenseRouter(Router):
    """Softmax over all experts (LoRAMoE, arXiv 2312.09979, eq. 4; MoLORA, arXiv 2309.05444, eq. 4).

    Args:
        in_features: D, width of the input.
        num_experts: E.
        routed_scaling_factor: Factor of all weights.
        router_jitter_noise: See `Router`.
        expert_dropout: See `Router`.
        init_std: See `Router`.
    """

    fields: tuple[str, ...] = ("routed_scaling_factor", "router_jitter_noise", "expert_dropout")

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        routed_scaling_factor: float = 1.0,
        router_jitter_noise: float = 0.0,
        expert_dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_experts,
            router_jitter_noise=router_jitter_noise,
            expert_dropout=expert_dropout,
            init_std=init_std,
        )
        self.routed_scaling_factor = routed_scaling_factor

    def decide(self, logits_TE: torch.Tensor, context: TokenContext) -> Routing:
        """Weigh every expert by its probability; arguments as in `Router.decide`."""
        probs_TE = gate_probs(logits_TE, self.expert_dropout, context)
        weights_TE = probs_TE if self.routed_scaling_factor == 1.0 else probs_TE * self.routed_scaling_factor
        return Routing(weights=weights_TE, experts=None, logits=logits_TE, probs=probs_TE, context=context)
