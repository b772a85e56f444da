"""The ReLU gate: p = relu(z), so that scores below zero leave an expert out (ReMoE, Wang et al., arXiv 2412.14711)."""

from __future__ import annotations

import torch

from ..types import TokenContext
from .gates import Gate


class Relu(Gate):
    """Weights that are differentiable where experts come and go; a token may use any number of experts, or none."""

    gives = frozenset({"selection"})
    needs_positive = True

    def __call__(self, logits_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Turn scores into weights; arguments as in `Gate`."""
        return logits_TE.relu()
