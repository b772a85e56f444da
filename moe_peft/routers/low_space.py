"""The linear scorer behind the experts' shared down matrix: z = W A x (CoMoL, arXiv 2603.00573).

It reads r numbers of a token instead of D. Dropout on the experts' input does not reach the scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..types import TokenContext
from .linear import LinearArgs, LinearRouter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LowSpaceRouter(LinearRouter):
    """Scores the experts by a matrix on what their common down matrix makes of the input.

    Args:
        in_features: Taken for the signature that scorers share.
        num_experts: E.
        r: Rank of the down matrix.
        init_std: See `LinearRouter`.
        **shared: See `LinearRouter`.

    Attributes:
        weight: (num_scores, r).
    """

    fields = (*LinearRouter.fields, "r")
    reads = "activations"
    needs = frozenset({"shared_activations"})

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        r: int,
        init_std: float | None = None,
        **shared: Unpack[LinearArgs],
    ) -> None:
        super().__init__(r, num_experts, init_std=init_std, **shared)

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token by (T, 1, r) activations; arguments as in `Router.scores`."""
        return super().scores(x[:, 0], context)
