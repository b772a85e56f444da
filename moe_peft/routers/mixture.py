"""A mixture of routers: z = sum_m softmax(V x)_m W_m x (MoR, arXiv 2503.23362, the form of its abstract).

With one router it is the linear scorer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..ops import project
from ..part import Option
from ..types import TokenContext
from .router import Router, RouterArgs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MixtureRouter(Router):
    """Scores by several matrices, which a further one weighs for each token.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        num_routers: M, matrices that score.
        init_std: Standard deviation of a normal initialisation; None takes the uniform one of `nn.Linear`.
        **shared: See `Router`.

    Attributes:
        weight: (M, num_scores, D) matrices that score.
        mixing: V (M, D).
    """

    learns = True
    options = (
        Option(
            "num_routers",
            3,
            "a whole number from 1 to 1024",
            lambda value: type(value) is int and 1 <= value <= 1024,
            "Routers that are mixed, M.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_routers: int = 3,
        init_std: float | None = None,
        **shared: Unpack[RouterArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        self.weight = nn.Parameter(torch.empty(num_routers, self.num_scores, in_features))
        self.mixing = nn.Parameter(torch.empty(num_routers, in_features))
        bound = math.sqrt(1 / in_features)
        for matrix in (self.weight, self.mixing):
            if init_std is None:
                nn.init.uniform_(matrix, -bound, bound)
            else:
                nn.init.normal_(matrix, std=init_std)

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token; arguments as in `Router.scores`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        num_routers, num_scores, _ = self.weight.shape
        every_TR = project(x, self.weight.flatten(0, 1), self.mixing, dtype=dtype)
        scores_TR, mixing_TM = every_TR.split([num_routers * num_scores, num_routers], dim=-1)
        scores_TME = scores_TR.unflatten(-1, (num_routers, num_scores))
        return (mixing_TM.softmax(-1)[..., None] * scores_TME).sum(1)
