"""One expert for each token, so that in training all experts of a sequence get as many: a linear assignment.

    training     a = argmax sum_t z_{t, a_t}   over assignments with at most c = ceil(n / E) tokens of an expert
    evaluation   a_t = argmax z_t                                                               w_t = p_{t, a_t}

BASE layers (Lewis et al., arXiv 2103.16716, with `gate="sigmoid"`), which assign the tokens of all processes together,
here those of each sequence. An auction finds the assignment: free tokens bid for the expert that they gain most with,
and an expert keeps its c best bids; the sum is within n eps of the best, eps being a hundredth of the scores' range.
Experts that a token may not see count as one range worse than the worst that any may, so that few are given to it.
An earlier token's expert depends on later tokens in training: for encoders, not for causal models. The auction runs on
the host, round by round, so that compiled training has a break in its graph here.
"""

from __future__ import annotations

import torch

from ..types import Routing, TokenContext
from .selector import Selector
from .task_table import MASKED
from .whole_rows import check_whole_rows

# Bids rise by the range of the scores over this number at least.
STEPS = 100
WHY_NOT_COMPILED = (
    "router='balanced_assignment' assigns tokens by an auction on the host, whose rounds no graph can hold: leave "
    "fullgraph out"
)


class BalancedAssignment(Selector):
    """The experts of an even assignment in training, and the largest in evaluation."""

    gives = frozenset({"selection"})
    causal = False
    num_slots = 1

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Assign each token; arguments as in `Selector`.

        Raises:
            ValueError: The tokens are slices of their rows, in training.
        """
        experts_T = probs_TE.argmax(-1)
        if context.training:
            experts_T = _by_sequence(logits_TE.detach()[:, :num_experts], experts_T, context)
        weights_T1 = probs_TE.gather(-1, experts_T[:, None])
        return Routing(
            weights=weights_T1, experts=experts_T[:, None], logits=logits_TE, probs=probs_TE, context=context
        )


@torch.compiler.disable(reason=WHY_NOT_COMPILED)
def _by_sequence(z_TE: torch.Tensor, experts_T: torch.Tensor, context: TokenContext) -> torch.Tensor:
    """(T,) experts of the valid tokens by assignment within their sequence, and of padding as they were."""
    why = "tokens of whole rows are assigned together"
    check_whole_rows(context, "router='balanced_assignment'", why, "use another router")
    owner_T = torch.zeros_like(experts_T) if context.sequences is None else context.sequences
    if context.valid is not None:
        owner_T = owner_T.masked_fill(~context.valid, -1)
    experts_T = experts_T.clone()
    for sequence in range(context.num_sequences):
        tokens_n = (owner_T == sequence).nonzero().squeeze(-1)
        experts_T[tokens_n] = assign(z_TE[tokens_n], -(-len(tokens_n) // z_TE.shape[1]))
    return experts_T


def assign(z_nE: torch.Tensor, places: int) -> torch.Tensor:
    """Assign tokens to experts with a nearly largest sum of scores, by an auction.

    Args:
        z_nE: (n, E) scores; where one is not finite, each token takes its largest. Those near `MASKED` are of experts
            that a token may not see.
        places: Tokens that an expert takes at most; `places` times E is n or more.

    Returns:
        (n,) int64 experts.
    """
    n, num_experts = z_nE.shape
    expert_n = torch.full((n,), -1, dtype=torch.long, device=z_nE.device)
    if n == 0 or num_experts == 1:
        return torch.zeros_like(expert_n)
    if not bool(z_nE.isfinite().all()):
        return z_nE.argmax(-1)
    z_nE = _with_one_range(z_nE)
    # Every bid must raise a price: in float64, and from zero, no step is lost beside the size of the scores.
    z_nE = z_nE.double() - z_nE.max().double()
    spread = -z_nE.min()
    eps = torch.where(spread > 0, spread, 1.0) / STEPS
    bids_nE, prices_E = torch.full_like(z_nE, -torch.inf), torch.zeros_like(z_nE[0])
    while bool((expert_n < 0).any()):
        free_f = (expert_n < 0).nonzero().squeeze(-1)
        gains_f2, wanted_f2 = (z_nE[free_f] - prices_E).topk(2, dim=-1)
        wanted_f = wanted_f2[:, 0]
        bids_nE[free_f, wanted_f] = prices_E[wanted_f] + gains_f2[:, 0] - gains_f2[:, 1] + eps
        best_cE, tokens_cE = bids_nE.topk(places, dim=0)
        bids_nE = torch.full_like(bids_nE, -torch.inf).scatter(0, tokens_cE, best_cE)
        expert_n = torch.where(bids_nE.isfinite().any(-1), bids_nE.argmax(-1), -1)
        prices_E = best_cE[-1].clamp_min(0)  # free while a place is
    return expert_n


def _with_one_range(z_nE: torch.Tensor) -> torch.Tensor:
    """Scores whose range is that of the experts which tokens may see, twice where there are others."""
    unseen_nE = z_nE < MASKED / 2
    seen_n = z_nE[~unseen_nE]
    if not bool(unseen_nE.any()) or seen_n.numel() == 0:
        return z_nE
    least, spread = seen_n.min(), seen_n.max() - seen_n.min()
    return torch.where(unseen_nE, least - torch.where(spread > 0, spread, 1.0), z_nE)
