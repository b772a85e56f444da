"""Sparsegen: the point of the simplex nearest to the scores, with a sparsity that each token chooses.

    w = argmin over the simplex of |w - z|^2 - lambda |w|^2 = max(z - tau, 0) / (1 - lambda)
    lambda = 1 - eps + logsigmoid(z_{E+1})          tau such that w sums to one

Laha et al., arXiv 1810.11975; as a router of adapters: LD-MoLE (arXiv 2509.25684), whose lambda comes from a two-layer
network that layers share, here from one row of the router's matrix, which starts at zero. The larger lambda is, the
fewer experts have a weight; the loss `sparsity_bound` asks for at most k.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..part import Option
from ..types import Routing, TokenContext
from .selector import Selector


def sparsemax(z_TE: torch.Tensor) -> torch.Tensor:
    """The point of the simplex nearest to z (Martins and Astudillo, arXiv 1602.02068, algorithm 1).

    Args:
        z_TE: (T, E).

    Returns:
        (T, E) weights that sum to one.
    """
    z_TE = z_TE - z_TE.detach().amax(-1, keepdim=True)
    sorted_TE = z_TE.sort(dim=-1, descending=True).values
    sums_TE = sorted_TE.cumsum(-1)
    count_E = torch.arange(1, z_TE.shape[-1] + 1, device=z_TE.device, dtype=z_TE.dtype)
    support_T1 = (1 + count_E * sorted_TE > sums_TE).sum(-1, keepdim=True)
    tau_T1 = (sums_TE.gather(-1, support_T1 - 1) - 1) / support_T1
    return (z_TE - tau_T1).relu()


class Sparsegen(Selector):
    """Sparse weights that sum to one, of the scores themselves.

    Args:
        eps: Distance of lambda from one at least.
        expert_dropout: Probability with which the router drops gates; a dropped expert gets no weight.
    """

    fields = ("expert_dropout",)
    needs = frozenset({"extra_scores"})
    gives = frozenset({"selection", "sparsity"})
    extra_scores = 1
    extra_starts_at_zero = True
    constant_for_one = True
    options = (
        Option(
            "eps",
            0.01,
            "a number above 0, up to 1",
            lambda value: not isinstance(value, bool) and 1e-6 < value <= 1,
            "Distance of the sparsity lambda from one at least.",
        ),
    )

    def __init__(self, *, eps: float = 0.01, expert_dropout: float = 0.0) -> None:
        self.eps, self.expert_dropout = eps, expert_dropout

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Project the scores onto the simplex; arguments as in `Selector`."""
        lambda_T = 1 - self.eps + F.logsigmoid(logits_TE[:, num_experts])
        scaled_TE = logits_TE[:, :num_experts] / (1 - lambda_T)[:, None]
        if self.expert_dropout > 0 and context.training:
            # What is below the largest by more than one has no weight.
            kept_TE, lowest_T1 = probs_TE != 0, scaled_TE.detach().amin(-1, keepdim=True)
            weights_TE = sparsemax(torch.where(kept_TE, scaled_TE, lowest_T1 - 2)) * kept_TE
        else:
            weights_TE = sparsemax(scaled_TE)
        return Routing(
            weights=weights_TE,
            experts=None,
            logits=logits_TE[:, :num_experts],
            probs=probs_TE,
            context=context,
            extras={"sparsity": lambda_T},
        )
