"""Dense (soft) routing: every token uses every expert, weighted by its probability."""

from __future__ import annotations

import torch

from ..types import Routing, TokenContext
from .gates import Gate
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

    def gates(self, probs_TE: torch.Tensor) -> torch.Tensor:
        """The probabilities; see `Selector.gates`."""
        return probs_TE


class DenseRouter(LinearRouter):
    """Linear scores, softmax, all experts.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        gate: See `LinearRouter`.
        routed_scaling_factor: See `LinearRouter`.
        router_jitter_noise: See `LinearRouter`.
        expert_dropout: See `LinearRouter`.
        init_std: See `LinearRouter`.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        gate: Gate | None = None,
        routed_scaling_factor: float = 1.0,
        router_jitter_noise: float = 0.0,
        expert_dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_experts,
            select=Dense(),
            gate=gate,
            routed_scaling_factor=routed_scaling_factor,
            router_jitter_noise=router_jitter_noise,
            expert_dropout=expert_dropout,
            init_std=init_std,
        )
