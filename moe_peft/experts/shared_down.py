"""Experts that share the down matrix: y = base + s sum_e g_e B_e A x.

HydraLoRA (Tian et al., arXiv 2404.19245), under dense weights; MoSLD (arXiv 2412.08946), under the two largest and
with dropout on the elements of A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..ops import combine_experts
from ..part import Option
from ..types import Routing, TokenContext
from .one_down import OneDownExperts
from .products import pair_products
from .ranked import PairSizes, start_pair

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SharedDownExperts(OneDownExperts):
    """A bank of up matrices behind one down matrix.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        init_weights: See `start_pair`.
        down_dropout: Probability that an element of A is dropped in training passes.
        **common: See `OneDownExperts`.

    Attributes:
        A: (r, D) down matrix.
        B: (E, r, O) up matrices, stored transposed.
    """

    mergeable = True
    varies = frozenset({"down_dropout"})
    options = (
        Option(
            "down_dropout",
            0.0,
            "a number from 0 up to, but not including, 1",
            lambda value: not isinstance(value, bool) and 0 <= value < 1,
            "Probability that an element of the shared down matrix is dropped in training.",
        ),
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_weights: bool | str = True,
        down_dropout: float = 0.0,
        **common: Unpack[PairSizes],
    ) -> None:
        super().__init__(in_features, **common)
        self.down_dropout = nn.Dropout(down_dropout)
        self.B = nn.Parameter(torch.empty(self.num_choices, self.A.shape[0], out_features))
        start_pair(self.A, self.B, init_weights)

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return {"A": (r,), "B": (num_experts, r)}

    def down(self, context: TokenContext) -> torch.Tensor:
        """(r, D) the down matrix, without the elements that are dropped in this pass."""
        return self.down_dropout(self.A) if self._drops_down(context) else self.A

    def _drops_down(self, context: TokenContext) -> bool:
        return context.training and self.down_dropout.p > 0

    def shared_rows(self, context: TokenContext) -> torch.Tensor | None:
        """(r, D) down matrix, where nothing is dropped; see `Experts`."""
        return None if self._drops_down(context) else super().shared_rows(context)

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Weigh a copy of the down projection for each expert, and lift them in one product; see `Experts.combine`."""
        gates_TE, h_TR = routing.gate_matrix(), h.repeat(1, self.num_choices)
        return combine_experts(h_TR, base_out_TO, self.B, gates_TE, scaling=self.scaling, in_place=in_place)

    def delta_products(self) -> torch.Tensor:
        """Inner products of the matrices s B_e A; see `Experts.delta_products`."""
        return self.scaling**2 * pair_products(self.A, self.B)

    def delta_factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A, and s sum_e w_e B_e; see `Experts.delta_factors`."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        B_rO = torch.einsum("e,ero->ro", weights_E.to(self.B.device, dtype), self.B.to(dtype))
        return self.A.to(dtype), self.scaling * B_rO.T

    def delta_weight(self, weights_E: torch.Tensor) -> torch.Tensor:
        """S (sum_e w_e B_e) A, (O, D); see `Experts.delta_weight`."""
        A_rD, B_Or = self.delta_factors(weights_E)
        return B_Or @ A_rD
