"""Top-p: as many experts as it takes to hold a share p* of the probability, so that unsure tokens use more.

    S = the experts in descending order of p, while the probability before them is less than p*;   w = p_S

Huang et al., arXiv 2403.07652. At least one expert is kept, and at most `max_k`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ..part import Option
from ..types import Routing, TokenContext
from .selector import Selector

# A probability mass that equals p* but for rounding is p*.
ROUNDING = 1e-5


def share_reached(sorted_TE: torch.Tensor, p: float, at_least: int = 1) -> torch.Tensor:
    """Which experts are kept, of probabilities in descending order.

    Args:
        sorted_TE: (T, E) probabilities.
        p: Share of the probability to keep; one keeps all.
        at_least: Experts that are kept in any case.

    Returns:
        (T, E) bool.
    """
    before_TE = F.pad(sorted_TE.cumsum(-1)[:, :-1], (1, 0))
    kept_TE = before_TE < p - ROUNDING if p < 1 else torch.ones_like(before_TE, dtype=torch.bool)
    return kept_TE | (torch.arange(sorted_TE.shape[-1], device=sorted_TE.device) < at_least)


class TopP(Selector):
    """The fewest experts that hold a share of the probability.

    Args:
        p: The share, p*; one keeps all experts.
        max_k: Experts that a token uses at most; None for no limit.
    """

    gives = frozenset({"selection"})
    constant_for_one = True
    varies = frozenset({"p"})
    options = (
        Option(
            "p",
            0.4,
            "a number above 0, up to 1",
            lambda value: not isinstance(value, bool) and ROUNDING < value <= 1,
            "Share of the probability that a token's experts hold, p*.",
        ),
        Option(
            "max_k",
            None,
            "a whole number from 1, or None",
            lambda value: value is None or (type(value) is int and value >= 1),
            "Experts that a token uses at most; None for no limit.",
        ),
    )

    def __init__(self, *, p: float = 0.4, max_k: int | None = None) -> None:
        self.p, self.max_k = p, max_k

    @property
    def num_slots(self) -> int | None:  # type: ignore[override]
        """K, which is `max_k` at any time."""
        return self.max_k

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """See `Part.misfit`."""
        if options["max_k"] is None or options["max_k"] <= sizes["num_experts"]:
            return None
        return f"max_k={options['max_k']} must be at most num_experts={sizes['num_experts']}, or None"

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Keep experts until they hold the share; arguments as in `Selector`."""
        sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
        left_out_TE = ~share_reached(sorted_TE.detach(), self.p) | (sorted_TE == 0)
        weights_TK = sorted_TE.masked_fill(left_out_TE, 0.0)[:, : self.max_k]
        experts_TK = order_TE.masked_fill(left_out_TE, num_experts)[:, : self.max_k]
        return Routing(weights=weights_TK, experts=experts_TK, logits=logits_TE, probs=probs_TE, context=context)
