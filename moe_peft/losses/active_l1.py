"""L1 on ReLU gates with a weight that finds the wanted number of active experts by itself.

    L = sum_e f_e P_e,   f_e = E / (k n) * number of valid tokens that use e,   P_e = mean over valid tokens of p_e
    weight *= 1.2 ^ sign(active experts of a token - k)        after each optimizer step, over all places and processes

ReMoE (Wang et al., arXiv 2412.14711, which writes the sign of (1 - k / E) - sparsity). The gradient flows
through P alone. Experts can only become fewer than at the start, so k is at most E / 2, about half of the scores being
positive then; and the weight stays between 1e-8 and one, from where it finds back in some dozen steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..part import Option
from ..types import RouterLoss, Routing, StepStatistics
from .masking import masked_sum, num_valid

FACTOR, LOWEST, HIGHEST = 1.2, 1e-8, 1.0


class ActiveL1(RouterLoss):
    """Loss of one place.

    Args:
        active: k, experts that a token is to use in the mean.
    """

    needs = frozenset({"selection"})
    adapts = True
    options = (
        Option(
            "active",
            1,
            "a number above zero",
            lambda value: not isinstance(value, bool) and 0 < value < float("inf"),
            "Experts that a token is to use in the mean, k.",
        ),
    )

    def __init__(self, *, active: float = 1) -> None:
        self.active = active

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """See `Part.misfit`."""
        active, num_experts = options["active"], sizes["num_experts"]
        if active <= max(1, num_experts / 2):
            return None
        return (
            f"active={active} must be at most num_experts / 2 = {num_experts / 2:g}: about half of the experts are "
            "active at the start, and the loss can only make them fewer"
        )

    def stacks_by(self) -> tuple[float]:
        """k; see `RouterLoss.stacks_by`."""
        return (self.active,)

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., 2E + 1) E / k times the tokens that use each expert, its summed probability, and the valid tokens."""
        used_E = routing.request_matrix().sum(-2) * routing.num_experts / self.active
        return torch.cat(
            [used_E, masked_sum(routing.probs, routing), num_valid(routing).expand_as(used_E[..., :1])], -1
        )

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., 2E + 1) sums."""
        num_experts = (sums.shape[-1] - 1) // 2
        used_E, probs_E, tokens = sums.split([num_experts, num_experts, 1], dim=-1)
        tokens = tokens.clamp_min(1)
        return (used_E / tokens * probs_E / tokens).sum(-1)

    def adapt(self, coefficient: float, statistics: Sequence[StepStatistics]) -> float:
        """Raise the weight while more experts are active than wanted, and lower it else; see `RouterLoss.adapt`."""
        requests = sum(float(own.requests.sum()) for own in statistics)
        wanted = self.active * sum(float(own.tokens) for own in statistics)
        changed = coefficient * FACTOR ** ((requests > wanted) - (requests < wanted))
        return min(max(changed, min(coefficient, LOWEST)), max(coefficient, HIGHEST))
