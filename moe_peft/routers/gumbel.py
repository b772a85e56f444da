"""The Gumbel-softmax gate: training passes draw experts, evaluation takes the probabilities they are drawn by.

    training     p = softmax((z + g) / tau),   g = -log(-log u),   u uniform
    evaluation   p = softmax(z / tau)
    hard         p is one for the largest and zero for the others, with the gradient of the soft p (straight through)

Jang et al., arXiv 1611.01144; as a gate over adapters: Mixture-of-Linguistic-Experts Adapters, arXiv 2310.16240.
"""

from __future__ import annotations

import torch

from ..ops import one_hot
from ..part import Option
from ..types import TokenContext
from .gates import Gate


class Gumbel(Gate):
    """Samples experts in training passes; the noise is repeated where a pass is.

    Args:
        tau: Temperature.
        hard: Whether a token's probability is all one expert's, in evaluation too.
    """

    sums_to_one = True
    varies = frozenset({"tau"})
    options = (
        Option(
            "tau",
            1.0,
            "a positive number",
            lambda value: not isinstance(value, bool) and 0 < value < 1e6,
            "Temperature of the Gumbel-softmax.",
        ),
        Option(
            "hard",
            False,
            "True or False",
            lambda value: isinstance(value, bool),
            "One expert a token, with the gradient of the soft probabilities.",
        ),
    )

    def __init__(self, *, tau: float = 1.0, hard: bool = False) -> None:
        self.tau, self.hard = tau, hard

    def __call__(self, logits_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Draw probabilities; arguments as in `Gate`."""
        if context.training:
            # An exponential draw is never below the smallest number whose logarithm is finite.
            noise_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format).exponential_()
            logits_TE = logits_TE - noise_TE.clamp_min(torch.finfo(noise_TE.dtype).tiny).log()
        soft_TE = (logits_TE / self.tau).softmax(-1)
        if not self.hard:
            return soft_TE
        chosen_TE = one_hot(soft_TE.argmax(-1), soft_TE.shape[-1], soft_TE.dtype)
        return chosen_TE + (soft_TE - soft_TE.detach()) if context.training else chosen_TE
