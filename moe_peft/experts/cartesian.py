"""Experts that are pairs of halves in series, one of several down and one of several up matrices.

    y = base + s sum_j B_j sum_i g_(i,j) A_i x,   e = i E2 + j   for i < E1, j < E2

CartesianMoE (Su et al., arXiv 2410.16077): every pair of a sub-expert of the first layer and one of the second is an
expert, so that experts share what they have in common. The paper's sub-experts are FFNs with a normalisation and a
residual between the layers; here they are the halves of a low-rank pair. Experts cost E1 r D + E2 r O parameters, and
the work follows E1 + E2. With the scorer `product_keys` the decision is a product of two as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops import divisor_below_root
from ..part import Option
from ..types import Routing, TokenContext
from .one_down import OneDownExperts
from .products import pair_products
from .ranked import PairSizes, start_pair

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CartesianExperts(OneDownExperts):
    """A bank of down and up matrices that all go with each other.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        num_down: Down matrices, which divide E; None takes the largest divisor of E up to its root.
        init_weights: See `start_pair`.
        **common: See `OneDownExperts`.

    Attributes:
        A: (E1, r, D) down matrices.
        B: (E2, r, O) up matrices, stored transposed.
    """

    mergeable = True
    separable = False  # a matrix belongs to several experts
    gives = frozenset()
    options = (
        Option(
            "num_down",
            None,
            "a whole number from 1 to 65536 that divides num_experts, or None",
            lambda value: value is None or (type(value) is int and 1 <= value <= 2**16),
            "Down matrices, E1; None for the largest divisor of E up to its root. Up matrices are E / E1.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_down: int | None = None,
        init_weights: bool | str = True,
        **common: Unpack[PairSizes],
    ) -> None:
        super().__init__(in_features, **common)
        first, r = num_down or divisor_below_root(self.num_choices), len(self.A)
        self.A = nn.Parameter(torch.empty(first, r, in_features))
        self.B = nn.Parameter(torch.empty(self.num_choices // first, r, out_features))
        start_pair(self.A, self.B, init_weights)

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """See `Part.misfit`."""
        first, num_experts = options["num_down"], sizes["num_experts"]
        if first is None or num_experts % first == 0:
            return None
        return f"num_down={first} must divide num_experts={num_experts}"

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`; of a bank that is as nearly square as can be."""
        return cls.saved_shapes(num_experts, r, {"num_down": None})

    @classmethod
    def saved_shapes(cls, num_experts: int, r: int, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """See `Experts.saved_shapes`."""
        first = options["num_down"] or divisor_below_root(num_experts)
        return {"A": (first, r), "B": (num_experts // first, r)}

    def down(self, context: TokenContext) -> torch.Tensor:
        """(E1 r, D) the down matrices, one below the other."""
        return self.A.reshape(-1, self.A.shape[-1])

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Weigh the first halves for each second one, and lift them in one product; see `Experts.combine`."""
        first, r, _ = self.A.shape
        with torch.autocast(h.device.type, enabled=False):
            gates_Tij = routing.gate_matrix().to(h.dtype).unflatten(-1, (first, -1))
            mixed_Tjr = gates_Tij.mT @ h.unflatten(-1, (first, r))
        return self.lift(mixed_Tjr.flatten(1), base_out_TO, self.B.reshape(-1, self.B.shape[-1]), in_place)

    def delta_products(self) -> torch.Tensor:
        """Inner products of the matrices s B_j A_i; see `Experts.delta_products`."""
        first, second = len(self.A), len(self.B)
        return self.scaling**2 * pair_products(self.A.repeat_interleave(second, 0), self.B.repeat(first, 1, 1))

    def delta_factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All A_i one below the other, and s sum_j w_(i,j) B_j side by side; see `Experts.delta_factors`."""
        A, B, weights_ij = self._factors(weights_E)
        B_RO = torch.einsum("ij,jro->iro", weights_ij, B).flatten(0, 1)
        return A.flatten(0, 1), self.scaling * B_RO.T

    def mean_factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of A_i and of s B_j, the latter times sum w; see `Experts.mean_factors`."""
        A, B, weights_ij = self._factors(weights_E)
        total = weights_ij.sum()
        shares_ij = weights_ij / total if total != 0 else weights_ij
        A_rD, B_rO = torch.einsum("ij,ird->rd", shares_ij, A), torch.einsum("ij,jro->ro", weights_ij, B)
        return A_rD, self.scaling * B_rO.T

    def delta_weight(self, weights_E: torch.Tensor) -> torch.Tensor:
        """S sum_(i,j) w_(i,j) B_j A_i, (O, D); see `Experts.delta_weight`."""
        A_RD, B_OR = self.delta_factors(weights_E)
        return B_OR @ A_RD

    def _factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both kinds of matrices and (E1, E2) weights, float32 or wider."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        weights_ij = weights_E.to(self.A.device, dtype).view(len(self.A), -1)
        return self.A.to(dtype), self.B.to(dtype), weights_ij
