"""One score for each expert at a place, whatever the token: z = w (Mixture-of-Linguistic-Experts, arXiv 2310.16240).

All tokens use the experts alike, so that the adapter merges into the weights once training is over. Under a gate that
lets scores above zero pass alone they start at 1 / E: an expert that starts below it would never be used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..types import TokenContext
from .router import Router, RouterArgs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LayerLogits(Router):
    """Learned scores of a place.

    Args:
        in_features: Taken for the signature that scorers share.
        num_experts: E.
        init_std: Standard deviation of the scores at the start; None takes 1e-3. Under a gate that needs scores above
            zero they start at 1 / E and more.
        **shared: See `Router`.

    Attributes:
        weight: (num_scores,) the scores.
    """

    gives = frozenset()  # with null experts a place could choose nothing for every token, and never learn again
    learns = True
    mergeable = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        init_std: float | None = None,
        **shared: Unpack[RouterArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        self.weight = nn.Parameter(torch.empty(self.num_scores))
        self.start_without_tokens(self.weight, 1e-3 if init_std is None else init_std)

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Give every token the same scores; arguments as in `Router.scores`."""
        return self.weight.to(torch.promote_types(x.dtype, torch.float32)).expand(x.shape[0], -1)
