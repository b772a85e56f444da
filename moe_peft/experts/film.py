"""Experts that scale and shift: y = u (1 + sum_e g_e c_e) + sum_e g_e b_e, u what the frozen module gives.

Feature-wise linear modulation (FiLM, Perez et al., arXiv 1709.07871) as experts (MoFME, arXiv 2312.16610): the vectors
of MoV with a bias. Scales are saved as their difference to one, so that all tensors start at zero.
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops import outside_autocast
from ..types import Routing, TokenContext
from .experts import Experts


class FilmExperts(Experts):
    """A bank of scales and shifts.

    Args:
        in_features: Taken for the signature that kinds of experts share.
        out_features: O, width of the output.
        num_experts: E.
        r: Taken for the signature that kinds of experts share.
        init_weights: True: zeros. False: normal with standard deviation 0.5, for tests.

    Attributes:
        c: (E, O) scales less one, float32 in a 16-bit model too.
        b: (E, O) shifts.
    """

    fields: tuple[str, ...] = ("init_weights",)
    keeps_float32 = True
    up = ("c", "b")

    def __init__(
        self, in_features: int, out_features: int, *, num_experts: int, r: int, init_weights: bool | str = True
    ) -> None:
        super().__init__()
        self.num_choices = num_experts
        self.c = nn.Parameter(torch.zeros(num_experts, out_features))
        self.b = nn.Parameter(torch.zeros(num_experts, out_features))
        if init_weights is False:
            for tensor in (self.c, self.b):
                nn.init.normal_(tensor, std=0.5)

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return {"c": (num_experts,), "b": (num_experts,)}

    def prepare(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """The input as it is, of which these experts make nothing; arguments as in `Experts.prepare`."""
        return x_TD

    @torch.no_grad()
    def delta_products(self) -> torch.Tensor:
        """Inner products of scales less one and shifts, as one vector each; see `Experts.delta_products`."""
        both = torch.cat([self.c, self.b], -1).double()
        return both @ both.T

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Scale and shift the base output; `h` and `in_place` are not used, see `Experts.combine`."""
        dtype = base_out_TO.dtype
        with outside_autocast(base_out_TO.device.type):
            both = routing.gate_matrix().to(dtype) @ torch.cat([self.c, self.b], -1).to(dtype)
            scales_TO, shifts_TO = both.chunk(2, -1)
            return torch.addcmul(base_out_TO + shifts_TO, base_out_TO, scales_TO)
