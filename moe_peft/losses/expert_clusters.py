"""Experts of a cluster are kept alike: the variance of their mean probabilities within clusters.

    L = E sum_e (P_e - mean of P over the cluster of e)^2,   P_e = mean over valid tokens of p_e

MoEC (Xie et al., arXiv 2207.09094, the part of its loss within clusters): tokens may prefer a cluster of neighbours,
within which all experts learn from them, so that few tokens do not leave an expert with none. The variance between
clusters, which the paper divides by, has no weight here.
"""

from __future__ import annotations

import torch

from ..part import Option
from ..types import RouterLoss, Routing
from .masking import masked_sum, num_valid


class ExpertClusters(RouterLoss):
    """Zero where the experts of each cluster are used alike.

    Args:
        cluster_size: Experts of a cluster, neighbours; the last cluster may have fewer.
    """

    options = (
        Option(
            "cluster_size",
            2,
            "a whole number from 1 to 65536",
            lambda value: type(value) is int and 1 <= value <= 2**16,
            "Experts of a cluster, neighbours; the last cluster may have fewer.",
        ),
    )

    def __init__(self, cluster_size: int = 2) -> None:
        self.cluster_size = cluster_size

    def stacks_by(self) -> int:
        """The size of clusters; see `RouterLoss.stacks_by`."""
        return self.cluster_size

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., E + 1) summed distance of each expert's probability from its cluster's mean, and valid tokens."""
        probs_E = masked_sum(routing.probs, routing)
        cluster_E = torch.arange(probs_E.shape[-1], device=probs_E.device) // self.cluster_size
        same_EE = (cluster_E[:, None] == cluster_E).to(probs_E.dtype)
        apart_E = probs_E - probs_E @ (same_EE / same_EE.sum(-1, keepdim=True)).T
        return torch.cat([apart_E, num_valid(routing).expand_as(apart_E[..., :1])], dim=-1)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., E + 1) sums."""
        apart_E = sums[..., :-1] / sums[..., -1:].clamp_min(1)
        return apart_E.shape[-1] * apart_E.square().sum(-1)
