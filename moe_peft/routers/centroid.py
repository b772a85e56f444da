"""Routing to the nearest centroid, without training: z_e = cos(x, c_e) / tau.

A centroid is the mean input of a place on the texts of an expert's task (Belofsky, arXiv 2311.10847; `fit_centroids`
makes them), or the direction of the input that an expert answers most, either sign of it (Arrow, arXiv 2405.11157;
`fit_directions`, with sign_agnostic).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import directions, outside_autocast
from ..part import Option
from ..types import TokenContext
from .router import Router, RouterArgs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Centroid(Router):
    """Scores by fixed vectors.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        tau: Temperature.
        sign_agnostic: Whether the absolute value of the cosine counts.
        init_std: Standard deviation of the vectors before they are fitted; None takes one. Their length is without
            effect.
        **shared: See `Router`.

    Attributes:
        weight: (num_scores, D) centroids, never trained.
    """

    frozen = ("weight",)
    varies = frozenset({"tau"})
    takes_prototypes = True
    options = (
        Option(
            "tau",
            0.1,
            "a positive number",
            lambda value: not isinstance(value, bool) and 0 < value < 1e6,
            "Temperature of the cosines.",
        ),
        Option(
            "sign_agnostic",
            False,
            "True or False",
            lambda value: isinstance(value, bool),
            "Whether the absolute value of the cosine counts, as in Arrow.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        tau: float = 0.1,
        sign_agnostic: bool = False,
        init_std: float | None = None,
        **shared: Unpack[RouterArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        self.tau, self.sign_agnostic = tau, sign_agnostic
        self.weight = nn.Parameter(torch.empty(self.num_scores, in_features), requires_grad=False)
        nn.init.normal_(self.weight, std=1.0 if init_std is None else init_std)

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token; arguments as in `Router.scores`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with outside_autocast(x.device.type):
            z_TE = F.linear(directions(x.to(dtype)), F.normalize(self.weight.to(dtype), dim=-1)) / self.tau
        return z_TE.abs() if self.sign_agnostic else z_TE
