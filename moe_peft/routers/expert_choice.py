"""Expert choice: each expert takes the tokens of a sequence that score it highest, so that all are used alike.

    expert e takes the c tokens of a sequence with the largest p_te,   w_te = p_te   c = ceil(capacity_factor * n / E)

Zhou et al., arXiv 2202.09368. A token may have any number of experts, none included. Which tokens an expert takes
depends on all of a sequence, later ones too, in evaluation as in training: for encoders, not for causal models.
Padding is never taken, and documents of a packed row choose on their own. Loads are even by construction, so that no
balance loss of selections goes with it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..types import Routing, TokenContext
from .capacity import places, rank_by_score
from .selector import Selector
from .whole_rows import check_whole_rows

# Scores closer than this many last bits are equal: vectorised gates differ by one or two between tokens of one score.
LAST_BITS = 4
# Experts of a token in the mean, where the configuration says nothing (the paper's).
CAPACITY_FACTOR = 2.0


class ExpertChoice(Selector):
    """Experts choose tokens.

    Args:
        capacity_factor: Experts of a token in the mean; None means 2.
    """

    fields = ("capacity_factor",)
    causal = False
    context_needs = frozenset({"sequences"})
    varies = frozenset({"capacity_factor"})
    decode_stateless = False

    def __init__(self, *, capacity_factor: float | None = None) -> None:
        self.capacity_factor = CAPACITY_FACTOR if capacity_factor is None else capacity_factor

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Let each expert take its tokens; arguments as in `Selector`.

        Raises:
            ValueError: The tokens are slices of their rows.
        """
        why = "experts choose among the tokens of whole rows"
        check_whole_rows(context, "router='expert_choice'", why, "use another router")
        rank_TE, lengths_S, owner_T = rank_by_score(_levels(probs_TE.detach()), context)
        taken_TE = rank_TE <= places(lengths_S, self.capacity_factor, num_experts)[owner_T][:, None]
        if context.valid is not None:
            taken_TE = taken_TE & context.valid[:, None]
        weights_TE = probs_TE.masked_fill(~taken_TE, 0.0)
        return Routing(weights=weights_TE, experts=None, logits=logits_TE, probs=probs_TE, context=context)


def _levels(scores_TE: torch.Tensor) -> torch.Tensor:
    """(T, E) numbers in the order of the scores of each expert, equal where only rounding tells scores apart.

    Tokens of one task or one token id are taken in their order then, whatever stands beside them in the batch.
    """
    sorted_TE, order_TE = scores_TE.sort(dim=0, descending=True)
    rounding_TE = LAST_BITS * torch.finfo(scores_TE.dtype).eps * sorted_TE[1:].abs()
    below_TE = F.pad((sorted_TE[:-1] - sorted_TE[1:] > rounding_TE).long(), (0, 0, 1, 0)).cumsum(0)
    return torch.zeros_like(scores_TE).scatter(0, order_TE, -below_TE.to(scores_TE.dtype))
