"""Top-k routing: each token uses the k experts with the largest probability."""

from __future__ import annotations

from typing import Any

import torch

from ..types import Routing, TokenContext
from .gates import Gate
from .linear import LinearRouter
from .selector import SMALLEST_SUM, Selector


class TopK(Selector):
    """The k largest (arXiv 2101.03961; the token-choice router of transformers' sparse models).

    Args:
        top_k: K, experts a token uses.
        norm_topk_prob: Whether the kept weights are rescaled to sum to one. With K = 1 the weight is then the constant
            one and the router gets no gradient from the task.
        expert_dropout: Probability with which the router drops gates; where it does, a dropped gate is not selected.
    """

    fields: tuple[str, ...] = ("top_k", "norm_topk_prob", "expert_dropout")
    gives = frozenset({"selection"})
    varies = frozenset({"top_k", "expert_dropout"})
    constant_for_one = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let no class that picks in its own way inherit the short way, in which every slot holds an expert."""
        super().__init_subclass__(**kwargs)
        if "pick" in cls.__dict__ and "gates" not in cls.__dict__:
            cls.gates = Selector.gates  # type: ignore[method-assign]

    def __init__(self, *, top_k: int, norm_topk_prob: bool = False, expert_dropout: float = 0.0) -> None:
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.expert_dropout = expert_dropout

    @property
    def num_slots(self) -> int | None:
        """K, which is `top_k` at any time, unless a subclass has set it."""
        return self.__dict__.get("num_slots", self.top_k)

    @num_slots.setter
    def num_slots(self, value: int | None) -> None:
        self.__dict__["num_slots"] = value

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Keep the k largest probabilities; arguments as in `Selector`."""
        weights_TK, experts_TK = self.pick(probs_TE, **own)
        if self.expert_dropout > 0 and context.training:
            experts_TK = experts_TK.masked_fill(weights_TK == 0, num_experts)
        weights_TK = self.rescale(weights_TK)
        return Routing(weights=weights_TK, experts=experts_TK, logits=logits_TE, probs=probs_TE, context=context)

    def gates(self, probs_TE: torch.Tensor) -> torch.Tensor | None:
        """The kept probabilities among zeros; see `Selector.gates`."""
        weights_TK, experts_TK = self.pick(probs_TE)
        return torch.zeros_like(probs_TE).scatter_(-1, experts_TK, self.rescale(weights_TK))

    def pick(self, probs_TE: torch.Tensor, **own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept experts of each token.

        Args:
            probs_TE: (T, E) gate probabilities.
            **own: The tensors of `tensors`, by name.

        Returns:
            (T, K) their probabilities, and (T, K) their indices.
        """
        return probs_TE.topk(self.top_k, dim=-1)

    def rescale(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """Let the weights of a token sum to one where `norm_topk_prob`; weights that are all zero stay so."""
        if not self.norm_topk_prob:
            return weights_TK
        return weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)


class TopKRouter(LinearRouter):
    """Linear scores, softmax, the k largest.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        top_k: See `TopK`.
        norm_topk_prob: See `TopK`.
        gate: See `LinearRouter`.
        routed_scaling_factor: See `LinearRouter`.
        router_jitter_noise: See `LinearRouter`.
        expert_dropout: See `LinearRouter`.
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
        gate: Gate | None = None,
        routed_scaling_factor: float = 1.0,
        router_jitter_noise: float = 0.0,
        expert_dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_experts,
            select=TopK(top_k=top_k, norm_topk_prob=norm_topk_prob, expert_dropout=expert_dropout),
            gate=gate,
            routed_scaling_factor=routed_scaling_factor,
            router_jitter_noise=router_jitter_noise,
            expert_dropout=expert_dropout,
            init_std=init_std,
        )
