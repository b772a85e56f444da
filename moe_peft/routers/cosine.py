"""Cosine scores in a narrow space: z_e = cos(P x, v_e) / tau, with a learned temperature.

X-MoE (Chi et al., arXiv 2204.09179). Scores cannot grow with the width of the input, which keeps its representation
from collapsing onto the experts' vectors. Vectors are normalised where they are used and never rewritten.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import directions, project
from ..part import Option
from ..types import TokenContext
from .router import Router, RouterArgs

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Gain of the orthogonal vectors at the start, and the bounds of the temperature.
GAIN, LOWEST, HIGHEST = 0.32, 1e-4, 1e6


class Cosine(Router):
    """Scores by the angle to learned vectors.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        width: Width of the space in which angles are taken.
        tau: Temperature at the start.
        init_std: Standard deviation of P at the start; None takes the uniform one of `nn.Linear`.
        **shared: See `Router`.

    Attributes:
        projection: P (width, D).
        weight: (num_scores, width) vectors.
        log_tau: (1,) logarithm of the temperature.
    """

    learns = True
    options = (
        Option(
            "width",
            16,
            "a whole number from 1 to 65536",
            lambda value: type(value) is int and 1 <= value <= 2**16,
            "Width of the space in which angles are taken.",
        ),
        Option(
            "tau",
            0.07,
            "a number from 0.0001 to 1000000",
            lambda value: not isinstance(value, bool) and LOWEST <= value <= HIGHEST,
            "Temperature at the start; it is learned.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        width: int = 16,
        tau: float = 0.07,
        init_std: float | None = None,
        **shared: Unpack[RouterArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        self.projection = nn.Parameter(torch.empty(width, in_features))
        self.weight = nn.Parameter(torch.empty(self.num_scores, width))
        self.log_tau = nn.Parameter(torch.full((1,), math.log(tau)))
        if init_std is None:
            nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5))
        else:
            nn.init.normal_(self.projection, std=init_std)
        nn.init.orthogonal_(self.weight, gain=GAIN)

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token; arguments as in `Router.scores`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        low_TW = directions(project(x, self.projection, dtype=dtype))
        tau = self.log_tau.to(dtype).clamp(math.log(LOWEST), math.log(HIGHEST)).exp()
        return project(low_TW, F.normalize(self.weight.to(dtype), dim=-1)) / tau
