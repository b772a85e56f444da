"""Experts that share both matrices and differ by a diagonal between them: y = base + s B diag(sum_e g_e c_e) A x.

The CP form of multilinear mixtures (Oldfield et al., arXiv 2402.12550). An expert costs r parameters and the work does
not grow with their number.
"""

from __future__ import annotations

import torch
from torch import nn

from ..types import Routing
from .one_pair import OnePairExperts


class CpDiagonalExperts(OnePairExperts):
    """A bank of diagonals, normal around one at the start; arguments as in `OnePairExperts`.

    Attributes:
        A: (r, D) down matrix.
        c: (E, r) diagonals.
        B: (r, O) up matrix, stored transposed.
    """

    mergeable = True

    def make_between(self, num_experts: int, r: int) -> None:
        """Make the diagonals; see `OnePairExperts.make_between`."""
        self.c = nn.Parameter(torch.empty(num_experts, r))
        nn.init.normal_(self.c, mean=1.0, std=1.0)

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return {"A": (r,), "c": (num_experts, r), "B": (r,)}

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Scale the down projection by the mixed diagonal, and add its up projection; see `Experts.combine`."""
        with torch.autocast(h.device.type, enabled=False):
            mixed_Tr = h * (routing.gate_matrix().to(h.dtype) @ self.c.to(h.dtype))
        return self.lift(mixed_Tr, base_out_TO, self.B, in_place)

    @torch.no_grad()
    def delta_products(self) -> torch.Tensor:
        """Inner products of the matrices s B diag(c_e) A; see `Experts.delta_products`."""
        A, B, c_Er = self.A.double(), self.B.double(), self.c.double()
        return self.scaling**2 * c_Er @ ((B @ B.T) * (A @ A.T)) @ c_Er.T

    def delta_factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Diag(sum_e w_e c_e) A, and s B; see `Experts.delta_factors`."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        mixed_r = weights_E.to(self.c.device, dtype) @ self.c.to(dtype)
        return mixed_r[:, None] * self.A.to(dtype), self.scaling * self.B.to(dtype).T
