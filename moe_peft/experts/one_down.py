"""What kinds of experts share that have one down matrix: h = A dropout(x), of which each expert makes its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..ops import compute_dtype, project
from ..types import TokenContext
from .experts import Experts
from .ranked import BankArgs, RankedExperts
from .reading import read_for_decision

if TYPE_CHECKING:
    from typing_extensions import Unpack


class OneDownExperts(RankedExperts):
    """Base of banks with one down matrix.

    Args:
        in_features: D, width of the input.
        r: Rank.
        **common: See `RankedExperts`.

    Attributes:
        A: (r, D) down matrix.
    """

    gives = frozenset({"shared_activations"})
    up = ("B",)
    A: nn.Parameter

    def __init__(self, in_features: int, *, r: int, **common: Unpack[BankArgs]) -> None:
        super().__init__(**common)
        self.A = nn.Parameter(torch.empty(r, in_features))

    def down(self, context: TokenContext) -> torch.Tensor:
        """(r, D) the down matrix of this pass."""
        return self.A

    def prepare(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """(T, r) down projection; arguments as in `Experts.prepare`."""
        dtype = compute_dtype(x_TD)
        read_TD = self.drop(x_TD.to(dtype), context) if self.drops(context) else x_TD
        return project(read_TD, self.down(context), dtype=dtype)

    def activations(self, h: torch.Tensor) -> torch.Tensor:
        """(T, 1, r) of the (T, r) down projection."""
        return h[:, None]

    def undropped(self, x_TD: torch.Tensor, h: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Down projection of the input as it is; see `Experts.undropped`."""
        return read_for_decision(self, x_TD, h, context, dropped=self.shared_rows(context) is None)

    def shared_rows(self, context: TokenContext) -> torch.Tensor | None:
        """(r, D) down matrix, where nothing is dropped; see `Experts`."""
        own = type(self)
        plain = own.prepare is OneDownExperts.prepare and own.forward is Experts.forward
        return self.down(context) if plain and not self.drops(context) else None

    def lift(
        self, mixed_Tr: torch.Tensor, base_out_TO: torch.Tensor, B: torch.Tensor, in_place: bool = False
    ) -> torch.Tensor:
        """Add s B times what the experts made to the base output.

        Args:
            mixed_Tr: (T, r) weighed sum over the experts.
            base_out_TO: (T, O) output of the frozen module.
            B: (r, O) up matrix, stored transposed.
            in_place: Whether `base_out_TO` may be overwritten.

        Returns:
            (T, O) in the dtype of `base_out_TO`.
        """
        B = B.to(mixed_Tr.dtype)
        with torch.autocast(mixed_Tr.device.type, enabled=False):
            if base_out_TO.dtype != mixed_Tr.dtype:
                return base_out_TO + (self.scaling * (mixed_Tr @ B)).to(base_out_TO.dtype)
            if in_place:
                return base_out_TO.addmm_(mixed_Tr, B, alpha=self.scaling)
            return torch.addmm(base_out_TO, mixed_Tr, B, alpha=self.scaling)
