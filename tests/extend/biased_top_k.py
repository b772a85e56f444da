"""Balance without a loss: a bias per expert joins the choice, never the weight, and follows what was asked for.

S = TopK(p + b),   w = p_S,   b_e += rate * sign(mean load - load_e)                 after each optimizer step
"""

from __future__ import annotations

import torch

from moe_peft.extend import Option, Routing, Selector

RATE = Option("rate", 1e-3, "a number from 0 to 1", lambda v: 0 <= v <= 1, "What a step adds to a bias.")


class BiasedTopK(Selector):
    fields = ("top_k",)
    options = (RATE,)
    gives = frozenset({"selection"})
    counts = True

    def __init__(self, *, top_k: int, rate: float = 1e-3) -> None:
        self.top_k = self.num_slots = top_k
        self.rate = rate

    def tensors(self, num_experts):
        return {"bias": torch.zeros(num_experts)}

    def __call__(self, logits_TE, probs_TE, context, num_experts, *, bias):
        experts_TK = (probs_TE.detach() + bias).topk(self.top_k, dim=-1).indices
        weights_TK = probs_TE.gather(-1, experts_TK)
        return Routing(weights=weights_TK, experts=experts_TK, logits=logits_TE, probs=probs_TE, context=context)

    def after_step(self, statistics, *, bias):
        bias += self.rate * (statistics.load.mean() - statistics.load).sign().to(bias)
