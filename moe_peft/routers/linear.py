"""The linear scorer: z = W x, in float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..ops import project
from ..types import TokenContext
from .router import Router, RouterArgs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearArgs(RouterArgs, total=False):
    """Keywords that a scorer hands on to its base; see `LinearRouter`."""

    router_jitter_noise: float


class LinearRouter(Router):
    """Scores the experts by a matrix.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        router_jitter_noise: Half-width of the uniform multiplicative noise on the input, in training passes.
        init_std: Standard deviation of a normal initialisation; None takes the uniform one of `nn.Linear`.
        **shared: See `Router`.

    Attributes:
        weight: (num_scores, D) float32, also in a bfloat16 model: rounding the scores changes which experts are
            selected.
    """

    fields: tuple[str, ...] = (*Router.fields, "router_jitter_noise")
    learns = True
    varies = frozenset({"router_jitter_noise"})

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        router_jitter_noise: float = 0.0,
        init_std: float | None = None,
        **shared: Unpack[RouterArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        self.router_jitter_noise = router_jitter_noise
        self.weight = nn.Parameter(torch.empty(self.num_scores, in_features, dtype=torch.float32))
        if init_std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=init_std)
        if self.select is not None and self.select.extra_starts_at_zero:
            nn.init.zeros_(self.weight[num_experts:])

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token; arguments as in `Router.scores`."""
        dtype = x.dtype if x.dtype.itemsize >= 4 else torch.float32
        if self.router_jitter_noise > 0:
            x = self.jittered(x.to(dtype), context)
        return project(x, self.weight, dtype=dtype)

    def jittered(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """The input with the noise of this pass; as it is where none acts.

        Args:
            x: Input in the dtype of the scores.
            context: What is known about the tokens.
        """
        if not self.jitters(context):
            return x
        return x * torch.empty_like(x).uniform_(1 - self.router_jitter_noise, 1 + self.router_jitter_noise)

    def jitters(self, context: TokenContext) -> bool:
        """Whether the scores of this pass are computed from a noisy input."""
        return self.deciding(context).training and self.router_jitter_noise > 0

    def shared_rows(self, context: TokenContext) -> torch.Tensor | None:
        """The weight, unless the input is noisy or a subclass scores or decides in its own way; see `Router`."""
        own = type(self)
        plain = own.scores is LinearRouter.scores and own.forward is Router.forward and own.reads == "input"
        return self.weight if plain and not self.jitters(context) else None
