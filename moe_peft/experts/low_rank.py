"""Low-rank experts: y = base + s * sum_e g_e B_e A_e dropout(x), s = lora_alpha / r (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import IMPLEMENTATIONS, combine_experts, project
from ..types import Routing, TokenContext


class LowRankExperts(nn.Module):
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
        experts_implementation: Name of the op that computes the sum, see `moe_peft.ops.IMPLEMENTATIONS`.

    Attributes:
        fields: Names of the config's fields and properties that the constructor takes by keyword, beside the sizes.
        A: (E, r, D) down matrices.
        B: (E, r, O) up matrices, stored transposed so that both GEMMs read them without a copy.
        mergeable: Whether the experts are linear in x.
        act: Elementwise function between the two matrices; None for the identity.
    """

    fields: tuple[str, ...] = ("scaling", "lora_dropout", "init_weights", "experts_implementation")
    mergeable: bool = True
    act: Callable[[torch.Tensor], torch.Tensor] | None = None

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
        experts_implementation: str = "dense",
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.lora_dropout = lora_dropout
        self.experts_implementation = experts_implementation
        self.A = nn.Parameter(torch.empty(num_experts, r, in_features))
        self.B = nn.Parameter(torch.zeros(num_experts, r, out_features))
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool | str) -> None:
        """Initialise A and B; see the class for the meaning of `init_weights`."""
        if init_weights == "gaussian":
            nn.init.normal_(self.A, std=0.02)
        else:
            # Each (r, D) slice is initialised as a Linear of its own; the fan of a 3-D tensor would be r * D.
            bound = math.sqrt(1.0 / self.A.shape[-1])
            nn.init.uniform_(self.A, -bound, bound)
        if init_weights is False:
            bound = math.sqrt(1.0 / self.B.shape[1])
            nn.init.uniform_(self.B, -bound, bound)
        else:
            nn.init.zeros_(self.B)

    def forward(
        self, x_TD: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Add the routed sum of the experts to the base output.

        Args:
            x_TD: (T, D) input in the compute dtype.
            base_out_TO: (T, O) output of the frozen layer.
            routing: Decision for the T tokens.
            in_place: Whether `base_out_TO` may be overwritten.

        Returns:
            (T, O) in the dtype of `base_out_TO`.
        """
        x_TD = self.drop(x_TD, routing.context)
        op = IMPLEMENTATIONS[self.experts_implementation]
        return op(x_TD, base_out_TO, self.A, self.B, routing, scaling=self.scaling, act=self.act, in_place=in_place)

    def drop(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Apply `lora_dropout` in training passes."""
        if self.lora_dropout == 0 or not context.training:
            return x_TD
        return F.dropout(x_TD, self.lora_dropout)

    def project_with(self, x_TD: torch.Tensor, router_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the down projections and the router's scores in one GEMM.

        Args:
            x_TD: (T, D) input in the dtype of the router's weight.
            router_weight: (E, D).

        Returns:
            (T, E * r) down projections and (T, E) router logits.
        """
        out = project(x_TD, self.A.reshape(-1, self.A.shape[-1]), router_weight)
        h_TR, logits_TE = out.split([out.shape[-1] - router_weight.shape[0], router_weight.shape[0]], dim=-1)
        return h_TR, logits_TE

    def combine(
        self, h_TR: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Add the routed sum to the base output, given the down projections of `project_with`."""
        gates_TE = routing.gate_matrix()
        return combine_experts(
            h_TR, base_out_TO, self.B, gates_TE, scaling=self.scaling, act=self.act, in_place=in_place
        )

    def delta_weight(self, weights_E: torch.Tensor) -> torch.Tensor:
        """The matrix that the experts add to the base weight under a constant routing.

        Args:
            weights_E: (E,) combine weights.

        Returns:
            (O, D) float32 or wider.
        """
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        B_ROE = (self.B.to(dtype) * weights_E.to(dtype)[:, None, None]).reshape(-1, self.B.shape[-1])
        return self.scaling * B_ROE.T @ self.A.to(dtype).reshape(-1, self.A.shape[-1])
