"""Experts are drawn at random in training, one for a sample, and all are averaged in evaluation.

    training     w_e = 1 for one expert of each sample (or of the batch), drawn evenly
    evaluation   w_e = 1 / E

AdaMix (Wang et al., arXiv 2205.12410) and THOR (Zuo et al., arXiv 2110.04260), whose loss of two passes that must
agree is `moe_peft.integrations.consistent`. As nothing depends on the input in evaluation, the adapter merges, into
the mean of what the experts add; AdaMix takes the mean of their matrices instead (`average_experts`), which is the
same where they share one of both.
"""

from __future__ import annotations

import torch

from ..ops import one_hot
from ..part import Option
from ..types import Routing, TokenContext
from .router import Router


class RandomRouter(Router):
    """A router without parameters that draws.

    Args:
        in_features: Taken for the signature that routers share.
        num_experts: E.
        draw_for: "sequence": every sequence has an expert of its own; "batch": all of a pass have one.
        routed_scaling_factor: See `Router`.
        init_std: Taken for the signature that routers share.
    """

    fields: tuple[str, ...] = ("routed_scaling_factor",)
    options = (
        Option(
            "draw_for",
            "sequence",
            "'sequence' or 'batch'",
            lambda value: value in ("sequence", "batch"),
            "Whether every sequence has an expert of its own in training, or all of a pass have one.",
        ),
    )
    mergeable = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        draw_for: str = "sequence",
        routed_scaling_factor: float = 1.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(in_features, num_experts, routed_scaling_factor=routed_scaling_factor)
        self.draw_for, self.one_draw = draw_for, draw_for == "batch"

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score all experts alike; arguments as in `Router.scores`."""
        return x.new_zeros(x.shape[0], self.num_experts, dtype=torch.promote_types(x.dtype, torch.float32))

    def decide(self, logits_TE: torch.Tensor, context: TokenContext) -> Routing:
        """Draw an expert for each sample, or weigh all alike in evaluation; arguments as in `Router.decide`."""
        probs_TE = torch.full_like(logits_TE, 1 / self.num_experts)
        weights_TE = self._drawn(logits_TE, context) if self.deciding(context).training else probs_TE
        return Routing(weights=self.scale(weights_TE), experts=None, logits=logits_TE, probs=probs_TE, context=context)

    def _drawn(self, logits_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """(T, E) one for the expert of each token's sample."""
        per_sequence = self.draw_for == "sequence" and context.sequences is not None
        count = context.num_sequences if per_sequence else 1
        drawn_S = torch.rand(count, self.num_experts, device=logits_TE.device).argmax(-1)
        ones_SE = one_hot(drawn_S, self.num_experts, logits_TE.dtype)
        return ones_SE[context.sequences] if per_sequence else ones_SE.expand_as(logits_TE)
