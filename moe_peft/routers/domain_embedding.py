"""Rows of the router are made of descriptions of the experts: z_e = P(d_e) x, so that a description adds an expert.

    P(d) = W2 (silu(W1 d) * (V1 d))

Nexus (Gritsch et al., arXiv 2408.15901): d_e is an embedding of expert e's domain, as the mean embedding of its texts,
and never trains; P, which does, is one for all experts, so that it makes a row for an expert that comes later. The
paper's P is shared by the layers, here every place has its own; its seed expert, which every token uses, is a shared
expert.
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
from .linear import LinearArgs, LinearRouter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DomainEmbedding(LinearRouter):
    """Scores by a matrix that a network makes of the experts' descriptions.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        width: Width of a description.
        hidden: Width between the network's matrices.
        init_std: Standard deviation of W2 at the start; None takes the uniform one of `nn.Linear`, as for the others.
        **shared: See `LinearRouter`.

    Attributes:
        domains: d (E, width), random until they are set, never trained.
        gate_weight: W1 (hidden, width).
        value_weight: V1 (hidden, width).
        weight: W2 (D, hidden).
    """

    gives = frozenset()  # further columns of selectors have no description
    frozen = ("domains",)
    descriptions = "domains"
    options = (
        Option(
            "width",
            64,
            "a whole number from 1 to 65536",
            lambda value: type(value) is int and 1 <= value <= 2**16,
            "Width of an expert's description, as of a text's embedding.",
        ),
        Option(
            "hidden",
            64,
            "a whole number from 1 to 65536",
            lambda value: type(value) is int and 1 <= value <= 2**16,
            "Width between the matrices of the network that makes rows of descriptions.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        width: int = 64,
        hidden: int = 64,
        init_std: float | None = None,
        **shared: Unpack[LinearArgs],
    ) -> None:
        super().__init__(in_features, num_experts, **shared)
        self.domains = nn.Parameter(torch.randn(num_experts, width), requires_grad=False)
        self.gate_weight = nn.Parameter(torch.empty(hidden, width))
        self.value_weight = nn.Parameter(torch.empty(hidden, width))
        self.weight = nn.Parameter(torch.empty(in_features, hidden))
        for matrix in (self.gate_weight, self.value_weight, self.weight):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if init_std is not None:
            nn.init.normal_(self.weight, std=init_std)

    def rows(self, dtype: torch.dtype) -> torch.Tensor:
        """The router's matrix.

        Args:
            dtype: In which it is computed.

        Returns:
            (E, D) P(d_e) of each expert.
        """
        gate_EH, value_EH = (
            project(self.domains, matrix, dtype=dtype) for matrix in (self.gate_weight, self.value_weight)
        )
        return project(F.silu(gate_EH) * value_EH, self.weight, dtype=dtype)

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token; arguments as in `Router.scores`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return project(self.jittered(x.to(dtype), context), self.rows(dtype), dtype=dtype)
