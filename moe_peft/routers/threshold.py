"""A learned threshold: experts count by what their probability is above it.

    tau = tau_max sigmoid(z_{E+1}),   w_e = relu(p_e - tau) / sum_j relu(p_j - tau)

AdaMoLE (Liu and Luo, arXiv 2405.00361) under a softmax; under a sigmoid gate the sparse form of MoA (2506.05928).
The last row of the router's matrix, which starts at zero, scores the threshold. With tau_max = 1 / E a softmax always
keeps an expert; where none is above the threshold the token is left as it is.
"""

from __future__ import annotations

import torch

from ..part import Option
from ..types import Routing, TokenContext
from .selector import SMALLEST_SUM, Selector


class Threshold(Selector):
    """The experts above the threshold.

    Args:
        tau_max: Largest threshold; None for 1 / E.
    """

    needs = frozenset({"extra_scores"})
    gives = frozenset({"selection", "threshold"})
    extra_scores = 1
    extra_starts_at_zero = True
    options = (
        Option(
            "tau_max",
            None,
            "a number above 0, up to 1, or None",
            lambda value: value is None or (not isinstance(value, bool) and 0 < value <= 1),
            "Largest threshold; None for one over the number of experts.",
        ),
    )

    def __init__(self, *, tau_max: float | None = None) -> None:
        self.tau_max = tau_max

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Weigh experts by their probability above the threshold; arguments as in `Selector`."""
        tau_T = (self.tau_max or 1 / num_experts) * logits_TE[:, num_experts].sigmoid()
        above_TE = (probs_TE - tau_T[:, None]).relu()
        return Routing(
            weights=above_TE / above_TE.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM),
            experts=None,
            logits=logits_TE[:, :num_experts],
            probs=probs_TE,
            context=context,
            extras={"threshold": tau_T},
        )
