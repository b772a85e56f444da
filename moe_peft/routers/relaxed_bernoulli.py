"""The relaxed Bernoulli gate: each expert is drawn by itself, and the weights of a token sum to one.

    training     p_e = b_e / sum_j b_j,   b_e = sigmoid((z_e + log u_e - log(1 - u_e)) / tau),   u uniform
    evaluation   the same with b_e = sigmoid(z_e / tau)

Poly (Ponti et al., arXiv 2202.13914), whose tasks choose their skills from a table so.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..part import Option
from ..types import TokenContext
from .gates import Gate


class RelaxedBernoulli(Gate):
    """Draws experts independently in training passes; the noise is repeated where a pass is.

    Args:
        tau: Temperature.
    """

    sums_to_one = True
    options = (
        Option(
            "tau",
            1.0,
            "a positive number",
            lambda value: not isinstance(value, bool) and 0 < value < 1e6,
            "Temperature of the relaxed draws.",
        ),
    )

    def __init__(self, *, tau: float = 1.0) -> None:
        self.tau = tau

    def __call__(self, logits_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Draw probabilities; arguments as in `Gate`."""
        if context.training:
            uniform_TE = torch.rand_like(logits_TE, memory_format=torch.contiguous_format)
            logits_TE = logits_TE + uniform_TE.logit(eps=torch.finfo(logits_TE.dtype).eps)
        # b / sum b of the logarithms, which neither overflows nor divides by zero.
        return F.logsigmoid(logits_TE / self.tau).softmax(-1)
