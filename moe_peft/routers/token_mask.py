"""Linear scores of the experts that a token's id may see: z = W x + m_id, m zero or so low that p is zero.

MaskMoE (Su et al., arXiv 2407.09816): a rare token sees one expert alone, which learns it from all of its
occurrences; a frequent one sees several. Which experts an id sees follows from a hash of it. The paper counts tokens
in the training data; here ids below a bound are frequent, as tokenizers that merge number their tokens by frequency.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from ..part import Option
from ..types import TokenContext
from .linear import LinearArgs, LinearRouter
from .task_table import MASKED
from .token_hash import hash_of, ids_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= 2**16


class TokenMask(LinearRouter):
    """Scores the experts that a token's id may see by a matrix.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        visible: Experts that a rare token sees.
        frequent_visible: Experts that a frequent token sees; None for all.
        frequent_below: Ids below it are those of frequent tokens.
        init_std: See `LinearRouter`.
        **shared: See `LinearRouter`.
    """

    context_needs = frozenset({"token_ids"})
    separable = False  # a hash counts the experts
    options = (
        Option("visible", 1, "a whole number from 1 to 65536", _is_count, "Experts that a rare token sees."),
        Option(
            "frequent_visible",
            None,
            "a whole number from 1 to 65536, or None",
            lambda value: value is None or _is_count(value),
            "Experts that a frequent token sees; None for all.",
        ),
        Option(
            "frequent_below",
            1000,
            "a whole number from 0",
            lambda value: type(value) is int and value >= 0,
            "Ids below it are those of frequent tokens.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        visible: int = 1,
        frequent_visible: int | None = None,
        frequent_below: int = 1000,
        init_std: float | None = None,
        **shared: Unpack[LinearArgs],
    ) -> None:
        super().__init__(in_features, num_experts, init_std=init_std, **shared)
        self.visible, self.frequent_below = visible, frequent_below
        self.frequent_visible = num_experts if frequent_visible is None else frequent_visible

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token; arguments as in `Router.scores`.

        Raises:
            ValueError: The batch brings no ids.
        """
        seen_TE = self.seen(ids_of(context, type(self).__name__).to(x.device))
        seen_TE = F.pad(seen_TE, (0, self.num_scores - self.num_experts), value=True)
        return super().scores(x, context).masked_fill(~seen_TE, MASKED)

    def seen(self, ids_T: torch.Tensor) -> torch.Tensor:
        """(T, E) bool, the experts that each id sees: neighbours, from one that its hash names."""
        experts_E = torch.arange(self.num_experts, device=ids_T.device)
        distance_TE = (experts_E - hash_of(ids_T, 0, self.num_experts)[:, None]) % self.num_experts
        number_T = torch.where(ids_T < self.frequent_below, self.frequent_visible, self.visible)
        return distance_TE < number_T[:, None]
