"""A small network scores the experts: z = W2 silu(W1 x).

A gate with a hidden layer, as KAMoE's (Inzirillo and Genet, arXiv 2409.15161, whose hidden layer is a gated residual
network of splines). A linear scorer parts the inputs by planes, this one by any border.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import project
from ..part import Option
from ..types import TokenContext
from .router import Router, RouterArgs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TwoLayer(Router):
    """Scores by two matrices with a nonlinearity between them.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        width: Width of the hidden layer.
        init_std: Standard deviation of W2 at the start; None takes the uniform one of `nn.Linear`, as for W1.
        **shared: See `Router`.

    Attributes:
        hidden: W1 (width, D).
        weight: W2 (num_scores, width).
    """

    learns = True
    options = (
        Option(
            "width",
            16,
            "a whole number from 1 to 65536",
            lambda value: type(value) is int and 1 <= value <= 2**16,
            "Width of the hidden layer.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        width: int = 16,
        init_std: float | None = None,
        **shared: Unpack[RouterArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        self.hidden = nn.Parameter(torch.empty(width, in_features))
        self.weight = nn.Parameter(torch.empty(self.num_scores, width))
        for matrix in (self.hidden, self.weight):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if init_std is not None:
            nn.init.normal_(self.weight, std=init_std)
        if self.select is not None and self.select.extra_starts_at_zero:
            nn.init.zeros_(self.weight[num_experts:])

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token; arguments as in `Router.scores`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return project(F.silu(project(x, self.hidden, dtype=dtype)), self.weight, dtype=dtype)
