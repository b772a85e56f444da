"""Neighbouring experts are kept alike: variance of the mean probabilities within pairs (MoEC, arXiv 2207.09094).

L = mean over pairs of (P_2i - P_2i+1)^2 / 4,   P_e mean over valid tokens of p_e
"""

from __future__ import annotations

import torch

from moe_peft.extend import RouterLoss, masked_sum, num_valid


class ClusterVariance(RouterLoss):
    def sums(self, routing):
        return torch.cat([masked_sum(routing.probs, routing), num_valid(routing)[None]])

    @staticmethod
    def value(sums):
        probs_E = sums[..., :-1] / sums[..., -1:].clamp_min(1)
        pairs = probs_E.shape[-1] // 2
        first, second = probs_E[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
        return (first - second).square().sum(-1) / 4 / max(pairs, 1)
