"""What a router that learns from another decision lacks: the squared distance of their probabilities.

    L = mean over valid tokens of sum_e (student_e - teacher_e)^2

CompeteSMoE (Pham et al., arXiv 2505.13380). The teacher counts as a constant; where there is none in a pass, the
student is its own teacher and the loss is zero.
"""

from __future__ import annotations

import torch

from ..types import RouterLoss, Routing
from .masking import masked_sum, num_valid


class RouterDistillation(RouterLoss):
    """Zero where student and teacher agree about every token."""

    needs = frozenset({"student_probs", "teacher_probs"})

    def stacks_by(self) -> tuple[()]:
        """Any; see `RouterLoss.stacks_by`."""
        return ()

    def sums(self, routing: Routing) -> torch.Tensor:
        """(..., 2) sum of the squared distances, and the number of valid tokens."""
        apart_TE = routing.extras["student_probs"] - routing.extras["teacher_probs"].detach()
        apart = masked_sum(apart_TE.square().sum(-1), routing)
        return torch.stack([apart, num_valid(routing).expand_as(apart)], dim=-1)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) loss of (..., 2) sums."""
        return sums[..., 0] / sums[..., 1].clamp_min(1)
