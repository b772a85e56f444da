"""The routing that a mixture-of-experts backbone has already decided, in the form of this package's routers."""

from __future__ import annotations

import torch

from ..types import Routing, TokenContext


def backbone_routing(
    experts_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int, context: TokenContext
) -> Routing:
    """Read a decision of the backbone's own router.

    Args:
        experts_TK: (T, K) integer expert indices; E and above mark a slot without an expert.
        weights_TK: (T, K) combine weights as the backbone uses them, rescaled and scaled.
        num_experts: E.
        context: What is known about the tokens.

    Returns:
        The decision, with float32 weights (float64 for float64). Its probabilities are the weights over their sum,
        its logits their logarithm: what the backbone did not select is unknown, and counts as zero.
    """
    dtype = torch.promote_types(weights_TK.dtype, torch.float32)
    experts_TK = experts_TK.long().clamp(max=num_experts)
    weights_TK = weights_TK.to(dtype).masked_fill(experts_TK == num_experts, 0.0)
    gates_TE = weights_TK.new_zeros(weights_TK.shape[0], num_experts + 1).scatter_add(1, experts_TK, weights_TK)[
        :, :-1
    ]
    tiny = torch.finfo(dtype).tiny
    probs_TE = gates_TE / gates_TE.sum(-1, keepdim=True).clamp_min(tiny)
    return Routing(
        weights=weights_TK,
        experts=experts_TK,
        logits=probs_TE.clamp_min(tiny).log(),
        probs=probs_TE,
        context=context,
    )
