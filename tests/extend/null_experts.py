"""Null experts: a token may choose nothing in place of an expert, so that tokens use different numbers of experts.

p = softmax over E + m scores, the k largest of them; null slots hold no expert
loss = (E + m) (sum over experts of f_e P_e + f P over the nulls, whose shares f are evened out)
"""

from __future__ import annotations

import torch

from moe_peft.extend import Option, RouterLoss, Routing, Selector, masked_sum, num_valid

NUM_NULL = Option("num_null", 2, "a whole number from 1", lambda v: isinstance(v, int) and v >= 1, "Null experts, m.")


class NullTopK(Selector):
    fields = ("top_k", "norm_topk_prob")
    options = (NUM_NULL,)
    gives = frozenset({"selection", "null_probs"})
    gates_extra = True

    def __init__(self, *, top_k: int, norm_topk_prob: bool = False, num_null: int = 2) -> None:
        self.top_k = self.num_slots = top_k
        self.norm_topk_prob, self.extra_scores = norm_topk_prob, num_null

    def __call__(self, logits_TE, probs_TE, context, num_experts, **own):
        weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK.masked_fill(experts_TK >= num_experts, 0.0)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return Routing(
            weights=weights_TK,
            experts=experts_TK.clamp(max=num_experts),
            logits=logits_TE,
            probs=probs_TE[:, :num_experts],
            context=context,
            extras={"null_probs": probs_TE[:, num_experts:]},
        )


class NullLoadBalancing(RouterLoss):
    needs = frozenset({"null_probs"})

    def sums(self, routing):
        null_probs, requests_E = routing.extras["null_probs"], routing.request_matrix().sum(0)
        tokens = num_valid(routing)
        null_requests = tokens * routing.experts.shape[-1] - requests_E.sum()
        rest = [null_requests, masked_sum(null_probs, routing).sum(), tokens, tokens * null_probs.shape[-1]]
        return torch.cat([requests_E, masked_sum(routing.probs, routing), torch.stack(rest)])

    @staticmethod
    def value(sums):
        requests_E, probs_E = sums[..., :-4].chunk(2, -1)
        null_requests, null_mass, tokens, weighted = sums[..., -4:].unbind(-1)
        num_null, asked = weighted / tokens.clamp_min(1), (requests_E.sum(-1) + null_requests).clamp_min(1)
        balance = (requests_E * probs_E).sum(-1) + null_requests / num_null.clamp_min(1) * null_mass
        return (requests_E.shape[-1] + num_null) * balance / (asked * tokens.clamp_min(1))
