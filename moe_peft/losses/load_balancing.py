"""Load balancing: the share of requests an expert gets, times the mean probability the router gives it.

    f_e = requests for e / all requests (sums to one),  P_e = mean over valid tokens of p_e
    load_balancing = E * sum_e f_e P_e                  one when balanced, E when collapsed
    gshard_load_balancing = 1/E * sum_e (c_e / n) P_e   c_e tokens that asked for e, n valid tokens

Switch Transformer (arXiv 2101.03961, eq. 4-6) and GShard (arXiv 2006.16668, algorithm 1; SiRA, arXiv 2311.09179). Per
layer; requests are counted before any capacity, and the gradient flows through P alone.
"""

from __future__ import annotations

import torch

from ..types import Routing
from .masking import masked_sum, num_valid


def load_balancing(routing: Routing) -> torch.Tensor:
    """Balance of a sparse router, with f summing to one.

    Args:
        routing: Sparse decision; a dense one gives the constant one.

    Returns:
        0-d loss, 1 when balanced and E when all tokens ask for one expert.
    """
    requests_E, probs_E = _requests_and_mean_probs(routing)
    fractions_E = requests_E / requests_E.sum().clamp_min(1)
    return routing.num_experts * (fractions_E * probs_E).sum()


def gshard_load_balancing(routing: Routing) -> torch.Tensor:
    """Balance of a sparse router in GShard's scale.

    Args:
        routing: Sparse decision with K experts per token.

    Returns:
        0-d loss, K / E^2 when balanced and 1 / E when K = 1 and all tokens ask for one expert.
    """
    requests_E, probs_E = _requests_and_mean_probs(routing)
    return (requests_E / num_valid(routing) * probs_E).sum() / routing.num_experts


def _requests_and_mean_probs(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    requests_E = routing.request_matrix().sum(0)
    return requests_E, masked_sum(routing.probs, routing) / num_valid(routing)
