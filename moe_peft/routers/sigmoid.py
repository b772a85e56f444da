"""The sigmoid gate: p_e = sigmoid(z_e), each expert by itself (sigma-MoE, arXiv 2310.10837; DeepSeek-V3, 2412.19437).

With `norm_topk_prob` the weights of the kept experts are p_e over their sum (arXiv 2505.10860).
"""

from __future__ import annotations

import torch

from ..types import TokenContext
from .gates import Gate


class Sigmoid(Gate):
    """Probabilities that do not compete, so that one expert's can change without those of the others."""

    def __call__(self, logits_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Turn scores into probabilities; arguments as in `Gate`."""
        return logits_TE.sigmoid()
