"""Uncertain tokens use all experts, and the others a few: the entropy of a token's probabilities tells which it is.

    H_q(p) >= H*:  w = p            else  w = p over the k largest, or over those that hold a share of the probability

GW-MoE (Wu et al., arXiv 2406.12375) broadcasts in training alone, at most `max_slots` tokens of a sequence, the first
ones. DynMoLE (arXiv 2504.00661) does so always, with Tsallis' entropy of index q and top-p for the other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..losses.entropy import entropy, largest_entropy
from ..part import Option
from ..types import Routing, TokenContext
from .capacity import rank_in_sequence
from .top_k import TopK
from .top_p import ROUNDING, share_reached
from .whole_rows import check_whole_rows

# Where no threshold is given: the share of the largest entropy that E experts allow.
UNCERTAIN = 0.95


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class EntropyTopK(TopK):
    """The k largest for tokens that are sure, all experts for those that are not.

    Args:
        top_k: Experts of a token that is sure; with `p` the least number of them.
        norm_topk_prob: See `TopK`; for tokens that are sure.
        expert_dropout: See `TopK`.
        entropy_threshold: H*, from which a token is uncertain; None for 0.95 of the largest that E experts allow.
        entropy_index: q of Tsallis' entropy; one is Shannon's, in nats.
        broadcast: "train": in training passes alone; "always".
        max_slots: Uncertain tokens of a sequence that are broadcast in training, the first ones; None for all.
        p: Share of the probability that the experts of a token that is sure hold; None for the k largest.
    """

    options = (
        Option(
            "entropy_threshold",
            None,
            "a number from 0, or None",
            lambda value: value is None or (_is_number(value) and 0 <= value < 1e6),
            "Entropy from which a token is uncertain; None for 0.95 of the largest.",
        ),
        Option(
            "entropy_index",
            1.0,
            "a positive number up to 100",
            lambda value: _is_number(value) and 0 < value <= 100,
            "Index q of Tsallis' entropy; 1 is Shannon's, in nats.",
        ),
        Option("broadcast", "train", "'train' or 'always'", lambda value: value in ("train", "always"), "When."),
        Option(
            "max_slots",
            None,
            "a whole number from 1, or None",
            lambda value: value is None or (type(value) is int and value >= 1),
            "Tokens of a sequence that are broadcast in training, the first ones; None for all.",
        ),
        Option(
            "p",
            None,
            "a number above 0, up to 1, or None",
            lambda value: value is None or (_is_number(value) and ROUNDING < value <= 1),
            "Share of the probability for tokens that are sure; None for the k largest.",
        ),
    )

    def __init__(
        self,
        *,
        top_k: int,
        norm_topk_prob: bool = False,
        expert_dropout: float = 0.0,
        entropy_threshold: float | None = None,
        entropy_index: float = 1.0,
        broadcast: str = "train",
        max_slots: int | None = None,
        p: float | None = None,
    ) -> None:
        super().__init__(top_k=top_k, norm_topk_prob=norm_topk_prob, expert_dropout=expert_dropout)
        self.num_slots = None
        self.entropy_threshold, self.entropy_index = entropy_threshold, entropy_index
        self.broadcast, self.max_slots, self.p = broadcast, max_slots, p

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """See `Part.misfit`: places are counted in training passes, so that decoding equals the full forward."""
        if options["max_slots"] is None or options["broadcast"] == "train":
            return None
        return f"max_slots={options['max_slots']} must be None with broadcast='always'"

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Give uncertain tokens all experts; arguments as in `Selector`."""
        few = super().__call__(logits_TE, probs_TE, context, num_experts, **own)
        weights_TE = few.gate_matrix() if self.p is None else self._by_share(probs_TE)
        if self.broadcast == "always" or context.training:
            uncertain_T = self._uncertain(probs_TE.detach(), context)
            weights_TE = torch.where(uncertain_T[:, None], probs_TE, weights_TE)
        return Routing(weights=weights_TE, experts=None, logits=logits_TE, probs=probs_TE, context=context)

    def _by_share(self, probs_TE: torch.Tensor) -> torch.Tensor:
        assert self.p is not None
        sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
        kept_TE = share_reached(sorted_TE.detach(), self.p, at_least=self.top_k)
        kept_TE = torch.zeros_like(kept_TE).scatter(-1, order_TE, kept_TE)
        return self.rescale(probs_TE.masked_fill(~kept_TE, 0.0))

    def _uncertain(self, probs_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """(T,) bool, the tokens that are broadcast."""
        least = self.entropy_threshold
        if least is None:
            least = UNCERTAIN * largest_entropy(probs_TE.shape[-1], self.entropy_index)
        uncertain_T = entropy(probs_TE, self.entropy_index) >= least - ROUNDING
        if self.max_slots is None:
            return uncertain_T
        why = "the first tokens are those of whole rows"
        check_whole_rows(context, f"max_slots={self.max_slots}", why, "max_slots=None")
        if context.valid is not None:
            uncertain_T = uncertain_T & context.valid
        owner_T = context.sequences
        if owner_T is None:
            owner_T = torch.zeros_like(uncertain_T, dtype=torch.long)
        rank_T1 = rank_in_sequence(uncertain_T.long()[:, None], owner_T, context.num_sequences, contiguous=True)
        return uncertain_T & (rank_T1[:, 0] <= self.max_slots)
