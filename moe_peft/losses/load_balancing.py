"""Load balancing: the share of requests an expert gets, times the mean probability the router gives it.

    f_e = requests for e / all requests (sums to one),  P_e = mean over valid tokens of p_e
    load_balancing = E * sum_e f_e P_e                  one when balanced, E when collapsed
    gshard_load_balancing = 1/E * sum_e (c_e / n) P_e   c_e tokens that asked for e, n valid tokens

Switch Transformer (arXiv 2101.03961, eq. 4-6) and GShard (arXiv 2006.16668, algorithm 1; SiRA, arXiv 2311.09179). Per
layer; requests are counted before any capacity, and the gradient flows through P alone.
"""

from __future__ import annotations

import torch

from ..types import RouterLoss, Routing
from .masking import masked_sum, num_valid


class LoadBalancing(RouterLoss):
    """Balance of a sparse router, with f summing to one; a dense decision gives the constant one.

    1 when balanced, and E when all tokens ask for one expert.
    """

    needs = frozenset({"selection"})

    def stacks_by(self) -> tuple[()]:
        """Any; see `RouterLoss.stacks_by`."""
        return ()

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., 2E + 1) requests for each expert, its summed probability, and the number of valid tokens."""
        requests_E, probs_E = routing.request_matrix().sum(-2), masked_sum(routing.probs, routing)
        return torch.cat([requests_E, probs_E, num_valid(routing).expand_as(probs_E[..., :1])], dim=-1)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., 2E + 1) sums."""
        requests_E, probs_E, tokens = _parts(sums)
        fractions_E = requests_E / requests_E.sum(-1, keepdim=True).clamp_min(1)
        return requests_E.shape[-1] * (fractions_E * probs_E / tokens).sum(-1)


class GShardLoadBalancing(LoadBalancing):
    """Balance of a sparse router in GShard's scale.

    K / E^2 when balanced, and 1 / E when K = 1 and all tokens ask for one expert.
    """

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., 2E + 1) sums."""
        requests_E, probs_E, tokens = _parts(sums)
        return (requests_E / tokens * probs_E / tokens).sum(-1) / requests_E.shape[-1]


def _parts(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_experts = (sums.shape[-1] - 1) // 2
    requests_E, probs_E, tokens = sums.split([num_experts, num_experts, 1], dim=-1)
    return requests_E, probs_E, tokens.clamp_min(1)


load_balancing = LoadBalancing()
gshard_load_balancing = GShardLoadBalancing()
