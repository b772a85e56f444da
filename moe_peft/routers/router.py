"""What routers share: the promises a router makes, and float32 scores z = W x of the linear ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import without_rounding
from ..types import Routing, TokenContext


class Router(nn.Module, ABC):
    """Decides which experts a token uses, and with which weight.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        routed_scaling_factor: Factor of all weights, after any rescaling.
        init_std: Standard deviation of a normal initialisation of what a router has to initialise, if anything.

    Attributes:
        fields: Names of the config fields that the constructor takes by keyword, beside `in_features`, `num_experts`
            and `init_std`.
        causal: No later token changes the decision for an earlier one.
        batch_invariant: No other row of the batch changes a decision.
        decode_stateless: Decoding token by token decides as the full forward does.
        mergeable: Outside training passes the weights are the same for every input, so that the experts can be merged
            into the base weight; no router is until it says so.
    """

    fields: tuple[str, ...] = ("routed_scaling_factor",)
    causal: bool = True
    batch_invariant: bool = True
    decode_stateless: bool = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        routed_scaling_factor: float = 1.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.routed_scaling_factor = routed_scaling_factor

    @property
    def mergeable(self) -> bool:
        """See the class; a class or a property of a subclass takes its place."""
        return False

    def scale(self, weights: torch.Tensor) -> torch.Tensor:
        """Apply `routed_scaling_factor` to combine weights of any shape."""
        return weights if self.routed_scaling_factor == 1.0 else weights * self.routed_scaling_factor

    @abstractmethod
    def forward(self, x_TD: torch.Tensor, context: TokenContext) -> Routing:
        """Decide about each token.

        Args:
            x_TD: (T, D) input of any floating dtype.
            context: What is known about the tokens.
        """


class LinearRouter(Router):
    """Scores the experts by a matrix, then decides.

    The two steps are separate so that the scores can be computed in the experts' own GEMM.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        routed_scaling_factor: Factor of all weights, after any rescaling.
        router_jitter_noise: Half-width of the uniform multiplicative noise on the input, in training passes.
        expert_dropout: Probability that a gate is dropped in training passes; survivors are divided by 1 - p.
        init_std: Standard deviation of a normal initialisation; None takes the uniform one of `nn.Linear`.

    Attributes:
        weight: (E, D) float32, also in a bfloat16 model: rounding the scores changes which experts are selected.
    """

    fields: tuple[str, ...] = (*Router.fields, "router_jitter_noise", "expert_dropout")

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        routed_scaling_factor: float = 1.0,
        router_jitter_noise: float = 0.0,
        expert_dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(in_features, num_experts, routed_scaling_factor=routed_scaling_factor, init_std=init_std)
        self.router_jitter_noise = router_jitter_noise
        self.expert_dropout = expert_dropout
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, dtype=torch.float32))
        if init_std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=init_std)

    def scores(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token.

        Args:
            x_TD: (T, D) input of any floating dtype.
            context: What is known about the tokens.

        Returns:
            (T, E) router logits, float32 (float64 for float64 input).
        """
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(dtype)
        if self.jitters(context):
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.router_jitter_noise, 1 + self.router_jitter_noise)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD, self.weight.to(dtype))

    def jitters(self, context: TokenContext) -> bool:
        """Whether the scores of this pass are computed from a noisy input."""
        return context.training and self.router_jitter_noise > 0

    @abstractmethod
    def decide(self, logits_TE: torch.Tensor, context: TokenContext) -> Routing:
        """Turn scores into a decision.

        Args:
            logits_TE: (T, E) router logits.
            context: What is known about the tokens.
        """

    def forward(self, x_TD: torch.Tensor, context: TokenContext) -> Routing:
        """Score the experts for each token and decide."""
        return self.decide(self.scores(x_TD, context), context)

    def _apply(self, fn: Callable, recurse: bool = True) -> LinearRouter:
        """Follow a change of device, but never one to a 16-bit dtype."""
        super()._apply(lambda t: without_rounding(t, fn(t)), recurse)
        return self


def gate_probs(logits_TE: torch.Tensor, expert_dropout: float, context: TokenContext) -> torch.Tensor:
    """Softmax over the experts, with inverted dropout of single gates in training passes.

    Args:
        logits_TE: (T, E) router logits.
        expert_dropout: p, the probability that a gate is dropped.
        context: What is known about the tokens.

    Returns:
        (T, E) probabilities; a dropped gate is exactly zero, a kept one is divided by 1 - p.
    """
    probs_TE = logits_TE.softmax(dim=-1)
    return F.dropout(probs_TE, expert_dropout, training=context.training) if expert_dropout > 0 else probs_TE
