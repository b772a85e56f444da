"""Low-rank experts beside experts that cost next to nothing: some add nothing, some a vector, some the input itself.

    zero      0
    constant  sigmoid(w_j x) v_j
    copy      a_j x            at places whose input and output are of one width

MoE++ (Jin et al., arXiv 2410.07348). Its constant expert is a1 x + a2 v with (a1, a2) = softmax(W x); what it keeps of
x is the frozen module's own output here, and a2 the sigmoid. Vectors and the factors a start at zero, so that the
adapter starts as the identity. Further experts are columns of the decision after the low-rank ones, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops import combine_experts, compute_dtype, project
from ..part import Option
from ..types import Routing, TokenContext
from .experts import Experts
from .low_rank import LowRankExperts
from .ranked import PairArgs, RankedExperts

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _count(name: str, default: int, help: str) -> Option:
    return Option(
        name,
        default,
        "a whole number from 0 to 65536",
        lambda value: type(value) is int and 0 <= value <= 2**16,
        help,
    )


class ZeroComputationExperts(LowRankExperts):
    """A bank of low-rank pairs and of experts without a matrix.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        zeros: Experts that add nothing.
        constants: Experts that add a vector.
        copies: Experts that add the input times a learned factor.
        **common: See `LowRankExperts`; `num_experts` counts the low-rank ones, and `lora_dropout` acts on what the
            sigmoid reads too.

    Attributes:
        A: (E, r, D) down matrices.
        B: (E, r, O) up matrices, stored transposed.
        W: (constants, D) weights of the sigmoid.
        v: (constants, O) vectors.
        a: (copies,) factors.
    """

    fields: tuple[str, ...] = RankedExperts.fields
    options = (
        _count("zeros", 1, "Experts that add nothing."),
        _count("constants", 1, "Experts that add a vector."),
        _count("copies", 0, "Experts that add the input times a factor, where input and output are of one width."),
    )
    gives = frozenset()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        zeros: int = 1,
        constants: int = 1,
        copies: int = 0,
        **common: Unpack[PairArgs],
    ) -> None:
        if copies and in_features != out_features:
            raise ValueError(
                f"experts_args: copies={copies} must be 0 at a place that reads {in_features} numbers of a token and "
                f"gives {out_features}: an input can be added to an output of its own width alone. Name other "
                "modules in target_modules, or wrap blocks."
            )
        super().__init__(in_features, out_features, shared=0, **common)  # every expert of the bank is routed
        self.num_low_rank, self.zeros, self.constants, self.copies = self.num_choices, zeros, constants, copies
        self.num_choices += zeros + constants + copies
        bound = math.sqrt(1 / in_features)
        if constants:
            self.W = nn.Parameter(torch.empty(constants, in_features).uniform_(-bound, bound))
            self.v = nn.Parameter(torch.zeros(constants, out_features))
        if copies:
            self.a = nn.Parameter(torch.zeros(copies))
        own = {"B": True, "v": constants, "a": copies}
        self.up = tuple(name for name, there in own.items() if there)
        if common.get("init_weights") is False:
            for name in self.up[1:]:
                nn.init.normal_(self.get_parameter(name), std=0.5)

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return {**super().shapes(num_experts, r), "W": (1,), "v": (1,)}

    @classmethod
    def saved_shapes(cls, num_experts: int, r: int, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """See `Experts.saved_shapes`."""
        own: dict[str, tuple[int, ...]] = LowRankExperts.shapes(num_experts, r)
        if options["constants"]:
            own |= {"W": (options["constants"],), "v": (options["constants"],)}
        return {**own, "a": (options["copies"],)} if options["copies"] else own

    @classmethod
    def further_choices(cls, options: Mapping[str, Any]) -> int:
        """See `Experts.further_choices`."""
        return int(options["zeros"] + options["constants"] + options["copies"])

    def prepare(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """(T, E r + constants) projections, and the (T, D) input for copies; arguments as in `Experts.prepare`."""
        dtype = compute_dtype(x_TD)
        read_TD = self.drop(x_TD.to(dtype), context)
        rows = (self.A.flatten(0, 1), *([self.W] if self.constants else []))
        h = project(read_TD, *rows, dtype=dtype)
        return torch.cat([h, x_TD.to(dtype)], -1) if self.copies else h

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Add what the experts of both sorts give; arguments as in `Experts.combine`."""
        num_experts, r, _ = self.A.shape
        h_TR, scores_TC, x_TD = h.split(
            [num_experts * r, self.constants, h.shape[-1] - num_experts * r - self.constants], -1
        )
        of_low_rank, _, of_constants, of_copies = routing.gate_matrix().split(
            [num_experts, self.zeros, self.constants, self.copies], -1
        )
        out_TO = combine_experts(h_TR, base_out_TO, self.B, of_low_rank, scaling=self.scaling, in_place=in_place)
        with torch.autocast(h.device.type, enabled=False):
            if self.constants:
                gates_TC = of_constants.to(h.dtype) * scores_TC.sigmoid()
                out_TO = out_TO + (gates_TC @ self.v.to(h.dtype)).to(out_TO.dtype)
            if self.copies:
                factor_T = of_copies.to(h.dtype) @ self.a.to(h.dtype)
                out_TO = out_TO + (factor_T[:, None] * x_TD).to(out_TO.dtype)
        return out_TO

    def forward(
        self, x_TD: torch.Tensor, base_out_TO: torch.Tensor, routing: Any, *, in_place: bool = False
    ) -> torch.Tensor:
        """Prepare and combine; arguments as in `Experts.forward`."""
        return Experts.forward(self, x_TD, base_out_TO, routing, in_place=in_place)

    def implementation(self, num_tokens: int, num_slots: int, **given: Any) -> None:  # type: ignore[override]
        """None, as there is one way; see `Experts.implementation`."""
        return None
