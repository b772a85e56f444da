"""Experts that share both matrices and differ by a core between them: y = base + s B (sum_e g_e C_e) A x.

Mixture of latent experts (Liu et al., arXiv 2503.23100) and CoMoL (arXiv 2603.00573), whose router reads A x. An
expert costs r^2 parameters.
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops import project
from ..types import Routing
from .one_pair import OnePairExperts

# Standard deviation of the cores around the identity at the start, which tells them apart.
CORE_STD = 0.02


class LatentCoreExperts(OnePairExperts):
    """A bank of cores, the identity plus noise at the start; arguments as in `OnePairExperts`.

    Attributes:
        A: (r, D) down matrix.
        C: (E, r, r) cores.
        B: (r, O) up matrix, stored transposed.
    """

    mergeable = True

    def make_between(self, num_experts: int, r: int) -> None:
        """Make the cores; see `OnePairExperts.make_between`."""
        self.C = nn.Parameter(torch.eye(r) + CORE_STD * torch.randn(num_experts, r, r))

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return {"A": (r,), "C": (num_experts, r), "B": (r,)}

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Weigh what each core makes of the down projection, and add the up projection; see `Experts.combine`."""
        made_TEr = project(h, self.C.flatten(0, 1)).view(h.shape[0], *self.C.shape[:2])
        mixed_Tr = (made_TEr * routing.gate_matrix().to(h.dtype)[..., None]).sum(1)
        return self.lift(mixed_Tr, base_out_TO, self.B, in_place)

    @torch.no_grad()
    def delta_products(self) -> torch.Tensor:
        """Inner products of the matrices s B C_e A; see `Experts.delta_products`."""
        A, B, C = self.A.double(), self.B.double(), self.C.double()
        framed = (B @ B.T) @ C @ (A @ A.T)
        return self.scaling**2 * C.flatten(1) @ framed.flatten(1).T

    def delta_factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A, and s B (sum_e w_e C_e); see `Experts.delta_factors`."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        C_rr = torch.einsum("e,ers->rs", weights_E.to(self.C.device, dtype), self.C.to(dtype))
        return self.A.to(dtype), self.scaling * self.B.to(dtype).T @ C_rr
