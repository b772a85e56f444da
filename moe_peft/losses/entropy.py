"""Entropy of the tokens' probabilities, H(p) = -sum_e p_e log p_e, with a finite gradient where a probability is zero.

With an index q other than one it is Tsallis' entropy, H_q(p) = (1 - sum_e p_e^q) / (q - 1), which tends to H as q
tends to one.
"""

from __future__ import annotations

import math

import torch


def entropy(probs_TE: torch.Tensor, index: float = 1.0) -> torch.Tensor:
    """(...) entropy of each token's probabilities in nats.

    Args:
        probs_TE: (..., E) probabilities.
        index: q.
    """
    if index != 1.0:
        return (1 - probs_TE.clamp_min(torch.finfo(probs_TE.dtype).tiny).pow(index).sum(-1)) / (index - 1)
    # The logarithm of a zero would be a NaN in the gradient of dropped gates.
    return -(probs_TE * probs_TE.clamp_min(torch.finfo(probs_TE.dtype).tiny).log()).sum(-1)


def largest_entropy(num_experts: int, index: float = 1.0) -> float:
    """The entropy of even probabilities.

    Args:
        num_experts: E.
        index: q.
    """
    if index != 1.0:
        return (1 - num_experts ** (1 - index)) / (index - 1)
    return math.log(num_experts)
