"""Sums over the valid tokens of routings, from which every statistic of a place follows.

Sums of several batches, or of several processes, add up to those of all their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..losses.masking import masked_sum, num_valid
from ..types import Routing


@dataclass(frozen=True)
class RoutingStatistics:
    """Sums of one place, or of several in a first dimension, in float32 or the routing's precision.

    Attributes:
        requests: (E,) tokens that asked for each expert, before any capacity.
        mass: (E,) summed combine weight of each expert.
        tokens: 0-d number of valid tokens.
        confidence_sum: 0-d sum of the tokens' largest gate probability.
        dropped: 0-d number of requests that found their expert full; None without a capacity.
    """

    requests: torch.Tensor
    mass: torch.Tensor
    tokens: torch.Tensor
    confidence_sum: torch.Tensor
    dropped: torch.Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, routing: Routing) -> RoutingStatistics:
        """Sum over a routing's valid tokens."""
        dropped = None if routing.dropped is None else masked_sum(routing.dropped.to(routing.probs), routing).sum()
        return cls(
            requests=routing.request_matrix().sum(0),
            mass=masked_sum(routing.gate_matrix(), routing).to(routing.probs),
            tokens=num_valid(routing),
            confidence_sum=masked_sum(routing.probs.amax(-1), routing),
            dropped=dropped,
        )

    @classmethod
    def stacked(cls, places: Sequence[RoutingStatistics]) -> RoutingStatistics:
        """Sums of several places, which have as many experts and all or none of them a capacity.

        Args:
            places: P of them.

        Returns:
            The sums with a first dimension P.
        """
        dropped = [place.dropped for place in places if place.dropped is not None]
        return cls(
            requests=torch.stack([place.requests for place in places]),
            mass=torch.stack([place.mass for place in places]),
            tokens=torch.stack([place.tokens for place in places]),
            confidence_sum=torch.stack([place.confidence_sum for place in places]),
            dropped=torch.stack(dropped) if dropped else None,
        )

    @property
    def load(self) -> torch.Tensor:
        """(E,) share of the requests that each expert gets, summing to one; uniform for a dense router."""
        return self.requests / self.requests.sum(-1, keepdim=True).clamp_min(1)

    @property
    def importance(self) -> torch.Tensor:
        """(E,) share of the gate mass that each expert gets, summing to one."""
        return self.mass / self.mass.sum(-1, keepdim=True).clamp_min(torch.finfo(self.mass.dtype).tiny)

    @property
    def load_entropy(self) -> torch.Tensor:
        """0-d entropy of the share of the gate mass over its maximum log E; one for a single expert."""
        num_experts = self.mass.shape[-1]
        if num_experts == 1:
            return torch.ones_like(self.mass[..., 0])
        return torch.special.entr(self.importance).sum(-1) / math.log(num_experts)

    @property
    def max_over_mean_load(self) -> torch.Tensor:
        """0-d largest share of the requests over the even share; one when balanced, E when collapsed."""
        return self.load.amax(-1) * self.load.shape[-1]

    @property
    def dead_experts(self) -> torch.Tensor:
        """0-d int64 number of experts that no valid token asked for."""
        return (self.requests == 0).sum(-1)

    @property
    def drop_rate(self) -> torch.Tensor:
        """0-d share of the requests that found their expert full; zero without a capacity."""
        if self.dropped is None:
            return torch.zeros_like(self.tokens)
        return self.dropped / self.requests.sum(-1).clamp_min(1)

    @property
    def confidence(self) -> torch.Tensor:
        """0-d mean over the valid tokens of the largest gate probability, in [1 / E, 1]."""
        return self.confidence_sum / self.tokens.clamp_min(1)
