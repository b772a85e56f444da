"""Null experts: a token may choose nothing in place of an expert, so that tokens use different numbers of experts.

    p = softmax over E + m scores,   S = the k largest;   w = p_S over the chosen experts, nothing for the chosen nulls

AdaMoE (Zeng et al., arXiv 2406.13233). With `norm_topk_prob` the weights of the chosen experts sum to one. A token
that chooses nulls alone is left as it is. In balance (`null_load_balancing`) m / (E + m) of the slots hold nothing, so
that k (1 - m / (E + m)) experts are used in the mean.
"""

from __future__ import annotations

import torch

from ..part import Option
from ..types import Routing, TokenContext
from .top_k import TopK


class NullTopK(TopK):
    """The k largest among experts and nulls.

    Args:
        top_k: K, slots of a token, which nulls take too.
        norm_topk_prob: See `TopK`; over the chosen experts.
        expert_dropout: See `TopK`.
        num_null: m, null experts.
    """

    needs = frozenset({"extra_scores"})
    gives = frozenset({"selection", "null_probs"})
    gates_extra = True
    constant_for_one = False
    options = (
        Option(
            "num_null",
            4,
            "a whole number from 1 to 65536",
            lambda value: type(value) is int and 1 <= value <= 2**16,
            "Null experts, m.",
        ),
    )

    def __init__(
        self, *, top_k: int, norm_topk_prob: bool = False, expert_dropout: float = 0.0, num_null: int = 4
    ) -> None:
        super().__init__(top_k=top_k, norm_topk_prob=norm_topk_prob, expert_dropout=expert_dropout)
        self.extra_scores = num_null

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Keep the k largest probabilities, and empty the slots of nulls; arguments as in `Selector`."""
        weights_TK, experts_TK = self.pick(probs_TE, **own)
        empty_TK = experts_TK >= num_experts
        if self.expert_dropout > 0 and context.training:
            empty_TK = empty_TK | (weights_TK == 0)
        return Routing(
            weights=self.rescale(weights_TK.masked_fill(empty_TK, 0.0)),
            experts=experts_TK.masked_fill(empty_TK, num_experts),
            logits=logits_TE,
            probs=probs_TE[:, :num_experts],
            context=context,
            extras={"null_probs": probs_TE[:, num_experts:]},
        )
