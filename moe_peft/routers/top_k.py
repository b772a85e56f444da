"""Top-k routing: each token uses the k experts with the largest g = softmax(W x)."""

from __future__ import annotations

import torch

from ..types import Routing, TokenContext
from .router import LinearRouter, gate_probs


class TopKRouter(LinearRouter):
    """Softmax, then the k largest (arXiv 2101.03961; the token-choice router of transformers' sparse models).

    Args:
        in_features: D, width of the input.
        num_experts: E.
        top_k: K, experts a token uses.
        norm_topk_prob: Whether the kept weights are rescaled to sum to one. With K = 1 the weight is then the constant
            one and the router gets no gradient from the task.
        routed_scaling_factor: See `LinearRouter`.
        router_jitter_noise: See `LinearRouter`.
        expert_dropout: See `LinearRouter`; a dropped gate is not selected.
        init_std: See `LinearRouter`.
    """

    fields: tuple[str, ...] = ("top_k", "norm_topk_prob", *LinearRouter.fields)

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        top_k: int,
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        router_jitter_noise: float = 0.0,
        expert_dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_experts,
            routed_scaling_factor=routed_scaling_factor,
            router_jitter_noise=router_jitter_noise,
            expert_dropout=expert_dropout,
            init_std=init_std,
        )
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob

    @property
    def mergeable(self) -> bool:
        """The softmax over a single expert is one."""
        return self.num_experts == 1

    def decide(self, logits_TE: torch.Tensor, context: TokenContext) -> Routing:
        """Keep the k largest probabilities; arguments as in `LinearRouter.decide`."""
        probs_TE = gate_probs(logits_TE, self.expert_dropout, context)
        weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        if self.expert_dropout > 0 and context.training:
            experts_TK = experts_TK.masked_fill(weights_TK == 0, self.num_experts)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).tiny)
        return Routing(
            weights=self.scale(weights_TK), experts=experts_TK, logits=logits_TE, probs=probs_TE, context=context
        )
