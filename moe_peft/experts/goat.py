"""Low-rank experts that start from the frozen weight's own singular vectors, each from another part of the spectrum.

    W0 = U S V',   A0_e = sqrt(S_e / (s rho)) V_e',   B0_e = U_e sqrt(S_e / (s rho)),   r triples of part e of E
    y = W0 x + s sum_e g_e (B_e A_e - B0_e A0_e) x,   with A_e = A0_e + dA_e, B_e = B0_e + dB_e

GOAT (Fan et al., arXiv 2502.16894), which takes the start out of the frozen weight; here the experts take it out of
themselves, so that W0 stays as it is, the adapter starts as the identity under any weights, and files hold all of it.
What is trained are the differences dA and dB, with the gradients that A and B have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..messages import shown
from ..ops import combine_experts, compute_dtype, project
from ..part import Option
from ..place import Place
from ..types import Routing, TokenContext
from .products import pair_products
from .ranked import BankArgs, RankedExperts, start_pair
from .reading import read_for_decision

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GoatExperts(RankedExperts):
    """A bank of low-rank pairs with a frozen start.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        r: Rank of one expert.
        init_weights: True: from the weight. "gaussian": A0 normal with standard deviation 0.02, B0 zero. False: dB
            normal too, for tests.
        rho: Factor by which the start is made small.
        weight: (O, D) weight of the frozen layer, or of its shape on the meta device; None where it is not known, as
            when the shapes of a file are looked at, for a uniform A0 and a B0 of zeros.
        **common: See `RankedExperts`.

    Attributes:
        A0: (E, r, D), never trained.
        B0: (E, r, O), never trained.
        dA: (E, r, D).
        dB: (E, r, O).
    """

    options = (
        Option(
            "rho",
            10.0,
            "a positive number up to 1000000",
            lambda value: not isinstance(value, bool) and 0 < value <= 1e6,
            "Factor by which the start from the weight's singular vectors is made small.",
        ),
    )
    gives = frozenset({"activations"})
    frozen = ("A0", "B0")
    up = ("dB",)
    mergeable = True
    reads_weight = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        init_weights: bool | str = True,
        rho: float = 10.0,
        weight: torch.Tensor | None = None,
        **common: Unpack[BankArgs],
    ) -> None:
        super().__init__(**common)
        shapes = [(self.num_choices, r, width) for width in (in_features, out_features)]
        self.A0, self.B0 = (nn.Parameter(torch.empty(shape), requires_grad=False) for shape in shapes)
        self.dA, self.dB = (nn.Parameter(torch.zeros(shape)) for shape in shapes)
        start_pair(self.A0, self.B0, init_weights or True)
        if weight is not None and not weight.is_meta and not self.A0.is_meta and init_weights != "gaussian":
            self._start_from(weight, rho)
        if init_weights is False:
            nn.init.normal_(self.dB, std=0.1)

    @torch.no_grad()
    def _start_from(self, weight_OD: torch.Tensor, rho: float) -> None:
        num_experts, r, _ = self.A0.shape
        left, values, right = torch.linalg.svd(weight_OD.float(), full_matrices=False)
        if r > len(values):
            raise ValueError(
                f"experts='goat': r={shown(r)} must be at most {len(values)}, as a weight of shape "
                f"{tuple(weight_OD.shape)} has no more singular vectors."
            )
        for e in range(num_experts):
            first = min(e * (len(values) // num_experts), len(values) - r)  # parts overlap where they are too short
            own = slice(first, first + r)
            root_r = (values[own] / (self.scaling * rho)).sqrt()[:, None]
            self.A0[e].copy_(root_r * right[own])
            self.B0[e].copy_(root_r * left[:, own].T)

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return dict.fromkeys(("A0", "B0", "dA", "dB"), (num_experts, r))

    def prepare(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """(T, E 2r) what A and dA of each expert make of the input; arguments as in `Experts.prepare`."""
        dtype = compute_dtype(x_TD)
        x_TD = self.drop(x_TD.to(dtype), context)
        rows = torch.cat([self.A0 + self.dA, self.dA], 1)
        return project(x_TD, rows.flatten(0, 1), dtype=dtype)

    def activations(self, h: torch.Tensor) -> torch.Tensor:
        """(T, E, r) A_e x."""
        num_experts, r, _ = self.A0.shape
        return h.view(-1, num_experts, 2 * r)[..., :r]

    def undropped(self, x_TD: torch.Tensor, h: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Projections of the input as it is; see `Experts.undropped`."""
        return read_for_decision(self, x_TD, h, context, dropped=self.drops(context))

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Add s sum_e g_e (dB_e A_e + B0_e dA_e) x, which is exactly nothing at the start; see `Experts.combine`."""
        up_E2rO = torch.cat([self.dB, self.B0], 1)
        gates_TE = routing.gate_matrix()
        return combine_experts(h, base_out_TO, up_E2rO, gates_TE, scaling=self.scaling, in_place=in_place)

    def delta_weight(self, weights_E: torch.Tensor) -> torch.Tensor:
        """S sum_e w_e (B_e A_e - B0_e A0_e), (O, D); see `Experts.delta_weight`."""
        dtype = torch.promote_types(self.dA.dtype, torch.float32)
        A0, B0, dA, dB = (tensor.to(dtype) for tensor in (self.A0, self.B0, self.dA, self.dB))
        weights_E = weights_E.to(dA.device, dtype)
        matrices_EOD = dB.mT @ (A0 + dA) + B0.mT @ dA
        return self.scaling * torch.einsum("e,eod->od", weights_E, matrices_EOD)

    def delta_products(self) -> torch.Tensor:
        """Inner products of the matrices s (B_e A_e - B0_e A0_e); see `Experts.delta_products`."""
        A, B = torch.cat([self.A0 + self.dA, self.dA], 1), torch.cat([self.dB, self.B0], 1)
        return self.scaling**2 * pair_products(A, B)

    def even_out(self) -> None:
        """Leave the sizes of the weight's own vectors; see `Experts.even_out`."""

    @classmethod
    def sizes_of(cls, place: Place) -> dict[str, Any]:
        """The weight of the place; see `Experts.sizes_of`."""
        return {"weight": place.weight() if place.weight is not None else None}
