"""Low-rank experts whose outputs are brought to one size: y = base + s sum_e g_e c_e * B_e A_e x / rms(B_e A_e x).

HoME (Wang et al., arXiv 2408.05430) normalises what experts give, so that gates of one expert and of another mean the
same; here by the root of the mean square, with a learned gain c_e for each output, which starts at zero. The mean
square is h (B_e B_e') h / O, so that no expert's output is made apart:

    h = A_e dropout(x),   rms^2 = h' (B_e' B_e) h / O + eps
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..ops import combine_experts
from ..types import Routing
from .experts import Experts, PendingRouting
from .low_rank import LowRankExperts
from .ranked import PairArgs, RankedExperts

if TYPE_CHECKING:
    from typing_extensions import Unpack

EPS = 1e-6


class NormalizedExperts(LowRankExperts):
    """A bank of low-rank pairs with gains.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        init_weights: True: A and B uniform as in `nn.Linear`, gains zero. "gaussian": A normal with standard deviation
            0.02. False: gains normal, for tests.
        shared: See `LowRankExperts`.
        **common: See `LowRankExperts`.

    Attributes:
        gain: c (E + S, O).
    """

    fields = RankedExperts.fields
    up = ("gain",)
    casts_input = True
    mergeable = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        shared: int = 0,
        **common: Unpack[PairArgs],
    ) -> None:
        super().__init__(in_features, out_features, experts_implementation="dense", shared=shared, **common)
        num_experts, r, _ = self.B.shape
        nn.init.uniform_(self.B, -(r**-0.5), r**-0.5)
        self.gain = nn.Parameter(torch.zeros(num_experts, out_features))
        if common.get("init_weights") is False:
            nn.init.normal_(self.gain)

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return {**super().shapes(num_experts, r), "gain": (num_experts,)}

    def forward(
        self,
        x_TD: torch.Tensor,
        base_out_TO: torch.Tensor,
        routing: Routing | PendingRouting,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Prepare and combine; arguments as in `Experts.forward`."""
        return Experts.forward(self, x_TD, base_out_TO, routing, in_place=in_place)

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Add the routed sum of outputs of one size to the base output; arguments as in `Experts.combine`."""
        gates_TE = self.with_shared(routing).gate_matrix()
        dtype = torch.promote_types(h.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            h_TEr, B_ErO = h.view(h.shape[0], *self.A.shape[:2]).to(dtype), self.B.to(dtype)
            gram_Err = B_ErO @ B_ErO.mT / B_ErO.shape[-1]
            square_TE = torch.einsum("ter,ers,tes->te", h_TEr, gram_Err, h_TEr).clamp_min(0)
            up_ErO = self.B * self.gain[:, None]
        gates_TE = gates_TE * (square_TE + EPS).rsqrt()
        return combine_experts(h, base_out_TO, up_ErO, gates_TE, scaling=self.scaling, in_place=in_place)
