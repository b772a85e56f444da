"""ReLU routing: an expert is used where its score is positive, and an L1 loss of adaptive weight keeps them few.

w = relu(z),   L = sum_e f_e mean_t w_te,   f_e = E / (k n) * number of tokens that use e
weight *= 1.2 ^ sign((1 - k / E) - sparsity)               after each optimizer step, from 1e-8 to 1
"""

from __future__ import annotations

import torch

from moe_peft.extend import Gate, Option, RouterLoss, Routing, Selector, masked_sum, num_valid


class Relu(Gate):
    def __call__(self, logits_TE, context):
        return logits_TE.relu()


class Positive(Selector):
    gives = frozenset({"selection"})

    def __call__(self, logits_TE, probs_TE, context, num_experts, **own):
        return Routing(weights=probs_TE, experts=None, logits=logits_TE, probs=probs_TE, context=context)


class ActiveL1(RouterLoss):
    needs = frozenset({"selection"})
    adapts = True
    options = (Option("active", 2, "a number of experts above zero", lambda v: v > 0, "Experts of a token, k."),)

    def __init__(self, *, active: float = 2) -> None:
        self.active = active

    def sums(self, routing):
        used_E = routing.request_matrix().sum(0) * routing.num_experts / self.active
        mass_E = masked_sum(routing.gate_matrix(), routing)
        return torch.cat([used_E, mass_E, num_valid(routing)[None]])

    @staticmethod
    def value(sums):
        num_experts = (sums.shape[-1] - 1) // 2
        used_E, mass_E, tokens = sums.split([num_experts, num_experts, 1], dim=-1)
        tokens = tokens.clamp_min(1)
        return (used_E / tokens * mass_E / tokens).sum(-1)

    def adapt(self, coefficient, statistics):
        requests = sum(float(own.requests.sum()) for own in statistics)
        sparsity = 1 - requests / sum(float(own.tokens) * own.requests.numel() for own in statistics)
        wanted = 1 - self.active / statistics[0].requests.numel()
        return min(max(coefficient * 1.2 ** ((wanted > sparsity) - (wanted < sparsity)), 1e-8), 1.0)
