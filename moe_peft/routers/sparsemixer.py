"""SparseMixer: one expert after the other is drawn in training, with a gradient that estimates that of the draw.

    pi = softmax(z over experts within a factor of the largest),   e ~ pi in training,   e = argmax z in evaluation
    w = pi_e;   in training a third of it, three times out of four, where e is not the largest
    dw = w_0 (1[i = e] - pi_i) dz_i with w_0 = pi_e, whether or not the weight is a third
    the next expert is drawn in the same way among the others

GRIN (Liu et al., arXiv 2409.12136) for two experts; here for any number. An expert is left out where (max - z_e) /
max(|z_e|, max) is above twice `jitter_eps`. Weights of a token need not sum to one.
"""

from __future__ import annotations

import torch

from ..part import Option
from ..types import Routing, TokenContext
from .selector import Selector

# Share of its weight that a drawn expert keeps that is not the largest, and how often it keeps all of it.
SHARE, KEEPS_ALL = 1 / 3, 1 / 4


class SparseMixer(Selector):
    """The experts that are drawn.

    Args:
        top_k: K, experts that are drawn one after the other.
        expert_dropout: Probability with which the router drops gates; a dropped one has no weight.
        jitter_eps: Half of the relative distance to the largest score within which an expert may be drawn.
    """

    fields = ("top_k", "expert_dropout")
    gives = frozenset({"selection"})
    constant_for_one = True
    varies = frozenset({"top_k", "expert_dropout", "jitter_eps"})
    options = (
        Option(
            "jitter_eps",
            0.01,
            "a positive number up to 1",
            lambda value: not isinstance(value, bool) and 0 < value <= 1,
            "Half of the relative distance to the largest score within which experts are drawn.",
        ),
    )

    def __init__(self, *, top_k: int, expert_dropout: float = 0.0, jitter_eps: float = 0.01) -> None:
        self.top_k = top_k
        self.expert_dropout, self.jitter_eps = expert_dropout, jitter_eps

    @property
    def num_slots(self) -> int | None:  # type: ignore[override]
        """K, which is `top_k` at any time."""
        return self.top_k

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Draw K experts; arguments as in `Selector`."""
        scores_TE = logits_TE[:, :num_experts]
        left_TE, weights, experts = scores_TE, [], []
        for _ in range(self.top_k):
            weight_T1, expert_T1 = self._draw(scores_TE, left_TE, context.training)
            weights.append(weight_T1)
            experts.append(expert_T1)
            left_TE = left_TE.scatter(-1, expert_T1, -torch.inf)
        weights_TK, experts_TK = torch.cat(weights, -1), torch.cat(experts, -1)
        if self.expert_dropout > 0 and context.training:
            dropped_TK = probs_TE.gather(-1, experts_TK) == 0
            weights_TK = weights_TK.masked_fill(dropped_TK, 0.0)
            experts_TK = experts_TK.masked_fill(dropped_TK, num_experts)
        return Routing(weights=weights_TK, experts=experts_TK, logits=logits_TE, probs=probs_TE, context=context)

    def _draw(
        self, scores_TE: torch.Tensor, left_TE: torch.Tensor, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, 1) weight and index of one further expert of each token.

        Args:
            scores_TE: Scores of all experts.
            left_TE: The same, and minus infinity for those that the token has.
            training: Whether they are drawn, instead of taken by their score.
        """
        largest_T1, best_T1 = left_TE.detach().max(-1, keepdim=True)
        scale_TE = scores_TE.detach().abs().clamp_min(largest_T1).clamp_min(torch.finfo(scores_TE.dtype).tiny)
        far_TE = (largest_T1 - scores_TE.detach()) / scale_TE > 2 * self.jitter_eps
        near_TE = left_TE.masked_fill(far_TE, -torch.inf)
        pi_TE = near_TE.softmax(-1)
        if not training:
            return pi_TE.gather(-1, best_T1), best_T1
        noise_TE = torch.empty_like(near_TE, memory_format=torch.contiguous_format).exponential_()
        noise_TE = noise_TE.clamp_min(torch.finfo(noise_TE.dtype).tiny).log()
        drawn_T1 = (near_TE.detach() - noise_TE).argmax(-1, keepdim=True)
        weight_T1 = pi_TE.gather(-1, drawn_T1)
        whole_T1 = (drawn_T1 == pi_TE.argmax(-1, keepdim=True)) | (torch.rand_like(weight_T1) < KEEPS_ALL)
        shown_T1 = torch.where(whole_T1, weight_T1, SHARE * weight_T1)
        return weight_T1 + (shown_T1 - weight_T1).detach(), drawn_T1  # the gradient is that of the whole weight
