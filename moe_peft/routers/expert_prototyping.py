"""One expert out of each group: groups choose apart, and a token uses as many experts as there are groups.

    e_z = the expert of group z with the largest p,   w_z = p_{e_z} / sum of p over group z

M6-T (Yang et al., arXiv 2105.15082), "k top-1": under a softmax the weight is that of the softmax within the group.
Groups are neighbours; k choices of one among E / k cost less than one of k among E, and cannot all fall on one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..part import Option
from ..types import Routing, TokenContext
from .selector import SMALLEST_SUM, Selector


class ExpertPrototyping(Selector):
    """The largest of each group.

    Args:
        num_prototypes: Z, groups of equal size.
    """

    gives = frozenset({"selection"})
    separable = False  # groups are made of neighbours
    options = (
        Option(
            "num_prototypes",
            1,
            "a whole number from 1 to 65536",
            lambda value: type(value) is int and 1 <= value <= 2**16,
            "Groups of equal size, each of which gives a token one expert.",
        ),
    )

    def __init__(self, *, num_prototypes: int = 1) -> None:
        self.num_prototypes = self.num_slots = num_prototypes

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """See `Part.misfit`."""
        number, num_experts = options["num_prototypes"], sizes["num_experts"]
        return f"num_prototypes={number} must divide num_experts={num_experts}" if num_experts % number else None

    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Keep the largest of each group; arguments as in `Selector`. A group whose gates are all zero gives none."""
        size = num_experts // self.num_prototypes
        groups_TZG = probs_TE.unflatten(-1, (self.num_prototypes, size))
        largest_TZ, places_TZ = groups_TZG.max(-1)
        experts_TZ = places_TZ + torch.arange(0, num_experts, size, device=places_TZ.device)
        totals_TZ = groups_TZG.sum(-1).clamp_min(SMALLEST_SUM)
        return Routing(
            weights=largest_TZ / totals_TZ,
            experts=experts_TZ.masked_fill(largest_TZ == 0, num_experts),
            logits=logits_TE,
            probs=probs_TE,
            context=context,
        )
