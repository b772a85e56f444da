"""Low-rank experts: y = base + s * sum_e g_e B_e A_e dropout(x), s = lora_alpha / r (LoRA, arXiv 2106.09685).

Shared experts beside the routed ones have the gate one for every token (DeepSeekMoE, arXiv 2401.06066).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..ops import (
    AUTO,
    IMPLEMENTATIONS,
    Work,
    add_gated,
    choose,
    combine_experts,
    compute_dtype,
    few_stay_dense,
    project,
)
from ..part import Option
from ..types import Routing, TokenContext
from .experts import PendingRouting
from .pair_algebra import PairAlgebra
from .ranked import PairArgs, RankedExperts, start_pair
from .reading import read_for_decision


class LowRankArgs(PairArgs, total=False):
    """Keywords that a kind of low-rank pairs hands on to its base; see `LowRankExperts`."""

    experts_implementation: str
    shared: int


class LowRankExperts(RankedExperts, PairAlgebra):
    """A bank of low-rank pairs.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        num_experts: E.
        r: Rank of one expert.
        scaling: s, the factor of the routed sum.
        lora_dropout: Probability that an input element is dropped in training passes; one mask for all experts.
        init_weights: True: A uniform as in `nn.Linear`, B zero, so that the adapter starts as the identity.
            "gaussian": A normal with standard deviation 0.02, B zero. False: both uniform, for tests.
        experts_implementation: Name of the op that computes the sum, see `moe_peft.ops.IMPLEMENTATIONS`; "auto"
            chooses by the work that each would do.
        shared: S, further experts that every token uses with weight one; routers and losses know nothing of them.

    Attributes:
        A: (E + S, r, D) down matrices, those of the shared experts last.
        B: (E + S, r, O) up matrices, stored transposed so that both GEMMs read them without a copy.
        lora_dropout: Dropout on the experts' input, in training passes.
        act: Elementwise function between the two matrices; None for the identity.
    """

    fields: tuple[str, ...] = (*RankedExperts.fields, "experts_implementation")
    options: tuple[Option, ...] = (
        Option(
            "shared",
            0,
            "a whole number from 0 to 65536",
            lambda value: type(value) is int and 0 <= value <= 2**16,
            "Further experts that every token uses with weight one.",
        ),
    )
    gives = frozenset({"activations", "responses"})
    up: tuple[str, ...] = ("B",)
    mergeable = True
    splits = True
    casts_input = True
    act: Callable[[torch.Tensor], torch.Tensor] | None = None
    _called_as_defined: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note whether a kind reads and combines in its own way, which the ops know nothing of."""
        super().__init_subclass__(**kwargs)
        cls._as_defined = cls.prepare is LowRankExperts.prepare and cls.combine is LowRankExperts.combine
        if not cls._as_defined and not {"gives", "responses"} & set(cls.__dict__):
            cls.gives = cls.gives - {"responses"}
        cls._called_as_defined = cls._as_defined and cls.forward is LowRankExperts.forward

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        r: int,
        scaling: float,
        lora_dropout: float = 0.0,
        init_weights: bool | str = True,
        experts_implementation: str = AUTO,
        shared: int = 0,
    ) -> None:
        super().__init__(num_experts=num_experts, scaling=scaling, lora_dropout=lora_dropout)
        self.experts_implementation, self.shared = experts_implementation, shared
        self.splits = type(self).splits and not shared
        self.A = nn.Parameter(torch.empty(num_experts + shared, r, in_features))
        self.B = nn.Parameter(torch.empty(num_experts + shared, r, out_features))
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool | str) -> None:
        """Initialise A and B; see `start_pair` for the meaning of `init_weights`."""
        start_pair(self.A, self.B, init_weights)

    def hold(self, num_experts: int) -> None:
        """See `ModulePart.hold`."""
        self.num_choices = num_experts

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return {"A": (num_experts, r), "B": (num_experts, r)}

    @classmethod
    def saved_shapes(cls, num_experts: int, r: int, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """See `Experts.saved_shapes`."""
        return cls.shapes(num_experts + options.get("shared", 0), r)

    def prepare(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """(T, (E + S) r) down projections of all experts; arguments as in `Experts.prepare`."""
        dtype = compute_dtype(x_TD)
        if self.drops(context):
            x_TD = self.drop(x_TD.to(dtype), context)
        return project(x_TD, self.A.reshape(-1, self.A.shape[-1]), dtype=dtype)

    def activations(self, h: torch.Tensor) -> torch.Tensor:
        """(T, E, r) of all down projections, without those of shared experts."""
        return h.view(h.shape[0], *self.A.shape[:2])[:, : self.num_choices]

    def responses(self, activations_TEr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations behind the nonlinearity, with the scale, and the up matrices; see `Experts.responses`."""
        act = self.activation(TokenContext())
        if act is not None:
            activations_TEr = act(activations_TEr.flatten(1)).view_as(activations_TEr)
        return self.scaling * activations_TEr, self.B[: self.num_choices]

    def undropped(self, x_TD: torch.Tensor, h: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Down projections of the input as it is; see `Experts.undropped`."""
        return read_for_decision(self, x_TD, h, context, dropped=self.drops(context))

    def with_shared(self, routing: Routing) -> Routing:
        """The decision about all experts of the bank, of which every token uses the shared ones with weight one."""
        if not self.shared:
            return routing
        weights, experts = routing.weights, routing.experts
        num_experts, everyone = routing.num_experts + self.shared, (weights.shape[0], self.shared)
        if experts is not None:
            experts = experts.masked_fill(experts == routing.num_experts, num_experts)
            always = torch.arange(routing.num_experts, num_experts, device=experts.device).expand(everyone)
            experts = torch.cat([experts, always], dim=-1)
        weights = torch.cat([weights, weights.new_ones(everyone)], dim=-1)
        return replace(routing, weights=weights, experts=experts, num_experts=num_experts, dropped=None)

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Add the routed sum to the base output; arguments as in `Experts.combine`."""
        gates_TE, act = self.with_shared(routing).gate_matrix(), self.activation(routing.context)
        return combine_experts(h, base_out_TO, self.B, gates_TE, scaling=self.scaling, act=act, in_place=in_place)

    def forward(
        self,
        x_TD: torch.Tensor,
        base_out_TO: torch.Tensor,
        routing: Routing | PendingRouting,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Add the routed sum of the experts to the base output; arguments as in `Experts.forward`."""
        if isinstance(routing, PendingRouting) or not self._as_defined:
            return super().forward(x_TD, base_out_TO, routing, in_place=in_place)
        dtype, context = compute_dtype(x_TD), routing.context
        name = self.implementation(*routing.weights.shape, dtype=dtype)
        settings: dict[str, Any] = {"scaling": self.scaling, "act": self.activation(context), "in_place": in_place}
        if name == "dense" and not self.drops(context):
            settings["dtype"] = dtype  # it keeps the input as it came
        else:
            x_TD = self.drop(x_TD.to(dtype), context)
        if self.shared:
            routing = self.with_shared(routing)
        return IMPLEMENTATIONS[name](x_TD, base_out_TO, self.A, self.B, routing, **settings)

    def add_all(
        self,
        x_TD: torch.Tensor,
        base_out_TO: torch.Tensor,
        weight: float,
        context: TokenContext,
        *,
        in_place: bool = False,
    ) -> torch.Tensor | None:
        """Add every expert with one weight, as one low-rank pair of rank E * r; arguments as in `Experts.add_all`."""
        if not self._called_as_defined or self.experts_implementation not in ("dense", AUTO):
            return None
        h_TR, act = self.prepare(x_TD, context), self.activation(context)
        scaling = self.scaling * weight
        return combine_experts(h_TR, base_out_TO, self.B, None, scaling=scaling, act=act, in_place=in_place)

    def takes_gates(self, x_TD: torch.Tensor, num_slots: int) -> bool:
        """Where two products over all experts are the way to their sum; see `Experts.takes_gates`."""
        if not self._called_as_defined or self.shared:
            return False
        if num_slots >= self.num_choices:
            return self.experts_implementation in ("dense", AUTO)
        return self.implementation(x_TD.shape[0], num_slots, dtype=compute_dtype(x_TD)) == "dense"

    def add_gated(
        self,
        x_TD: torch.Tensor,
        base_out_TO: torch.Tensor,
        gates_TE: torch.Tensor,
        context: TokenContext,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Add the weighted sum of all experts to the base output; arguments as in `Experts.add_gated`."""
        act, scaling = self.activation(context), self.scaling
        return add_gated(x_TD, base_out_TO, self.A, self.B, gates_TE, scaling=scaling, act=act, in_place=in_place)

    def activation(self, context: TokenContext) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Elementwise function between the two matrices in this pass; None for the identity."""
        return self.act

    def implementation(
        self,
        num_tokens: int,
        num_slots: int,
        *,
        dtype: torch.dtype | None = None,
        device_type: str | None = None,
    ) -> str:
        """Name of the op that computes a routed sum; arguments as in `Experts.implementation`."""
        if self.experts_implementation != AUTO:
            return self.experts_implementation
        if num_slots >= self.num_choices:
            return "dense"  # there is no work to skip
        num_experts, r, _ = self.A.shape
        compiling, num_slots = torch.compiler.is_compiling(), num_slots + self.shared
        if not compiling and few_stay_dense(num_tokens, num_slots, num_experts * r):
            return "dense"  # as is chosen for them; a decoded token asks at every place
        return choose(
            Work(
                num_tokens=num_tokens,
                num_experts=num_experts,
                num_slots=num_slots,
                r=r,
                dtype=dtype or self.A.dtype,
                device_type=device_type or self.A.device.type,
                compiling=compiling,
            )
        )

    def shared_rows(self, context: TokenContext) -> torch.Tensor | None:
        """(E * r, D) down matrices, where two GEMMs compute the sum and the input is not dropped; see `Experts`."""
        own = type(self)
        plain = own.prepare is LowRankExperts.prepare and own.forward is LowRankExperts.forward
        if not plain or self.experts_implementation not in ("dense", AUTO) or self.drops(context):
            return None
        return self.A.reshape(-1, self.A.shape[-1])
