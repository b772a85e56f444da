"""Experts that are whole gated FFNs, the frozen one with a low-rank pair on each of its matrices (MixLoRA).

    u = W1 x,                  t = W3 x,                  v = act(u) * t
    u_e = u + s B1_e A1_e x,   t_e = t + s B3_e A3_e x,   v_e = act(u_e) * t_e
    y = W2 (v + sum_e g_e (v_e - v)) + s sum_e g_e B2_e A2_e v_e

Li et al., arXiv 2404.15159. Where the weights g sum to one (`norm_topk_prob`) this is the paper's sum of whole FFNs,
sum_e g_e (W2 + s B2_e A2_e) v_e; as W2 is linear, it reads the sum once, however many experts a token uses. Under
other weights it is the frozen FFN and the weighed differences to it, so that it starts as the identity under any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops import compute_dtype, one_hot, outside_autocast, project
from ..place import Place
from ..types import Routing
from .products import pair_products
from .ranked import BankArgs, RankedExperts, start_pair

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FfnLoraExperts(RankedExperts):
    """A bank of pairs for the three matrices of a gated FFN.

    Args:
        in_features: D, width of the input.
        out_features: O, width of the output.
        r: Rank of one pair.
        inner_features: F, width between the matrices.
        init_weights: See `start_pair`.
        **common: See `RankedExperts`; `scaling` is the factor of each pair, and `lora_dropout` acts on the input of
            each matrix before A, with one mask for all experts that read the same input.

    Attributes:
        gate_A, up_A: (E, r, D) down matrices of the pairs on W1 and W3.
        gate_B, up_B: (E, r, F) their up matrices, stored transposed.
        down_A: (E, r, F) down matrices of the pairs on W2.
        down_B: (E, r, O) their up matrices, stored transposed.
    """

    placement = "ffn"
    up = ("gate_B", "up_B", "down_B")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        inner_features: int,
        init_weights: bool | str = True,
        **common: Unpack[BankArgs],
    ) -> None:
        super().__init__(**common)
        num_experts = self.num_choices
        self.gate_A, self.gate_B = _pair(num_experts, r, in_features, inner_features, init_weights)
        self.up_A, self.up_B = _pair(num_experts, r, in_features, inner_features, init_weights)
        self.down_A, self.down_B = _pair(num_experts, r, inner_features, out_features, init_weights)

    def delta_products(self) -> torch.Tensor:
        """Inner products of what the three matrices change by, added up; see `Experts.delta_products`."""
        pairs = ((self.gate_A, self.gate_B), (self.up_A, self.up_B), (self.down_A, self.down_B))
        return self.scaling**2 * torch.stack([pair_products(A, B) for A, B in pairs]).sum(0)

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return {f"{matrix}_{side}": (num_experts, r) for matrix in ("gate", "up", "down") for side in "AB"}

    @classmethod
    def sizes_of(cls, place: Place) -> dict[str, Any]:
        """F of the FFN; see `Experts.sizes_of`."""
        assert place.inner_features is not None
        return {"inner_features": place.inner_features}

    def forward(  # type: ignore[override]
        self,
        x_TD: torch.Tensor,
        u_TF: torch.Tensor,
        t_TF: torch.Tensor,
        v_TF: torch.Tensor,
        routing: Routing,
        *,
        act: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts change between the frozen matrices, and what they add to the output.

        Args:
            x_TD: (T, D) input of the FFN.
            u_TF: (T, F) W1 x.
            t_TF: (T, F) W3 x.
            v_TF: (T, F) act(u) * t.
            routing: Decision for the T tokens.
            act: The FFN's activation.

        Returns:
            (T, F) sum_e g_e (v_e - v), and (T, O) s sum_e g_e B2_e A2_e v_e, both in the compute dtype.
        """
        dtype, context = compute_dtype(x_TD), routing.context
        num_experts, r, _ = self.gate_A.shape
        read_TD = self.drop(x_TD.to(dtype), context)
        h_TR = project(read_TD, self.gate_A.flatten(0, 1), self.up_A.flatten(0, 1), dtype=dtype)
        h1_TEr, h3_TEr = h_TR.view(-1, 2, num_experts, r).unbind(1)
        changed_TF, mixed_TEr = torch.zeros_like(v_TF, dtype=dtype), torch.zeros_like(h1_TEr)
        for slot, weight_T1 in _slots(routing, dtype):
            with outside_autocast(x_TD.device.type):
                u_e, t_e = u_TF + self._lift(h1_TEr, self.gate_B, slot), t_TF + self._lift(h3_TEr, self.up_B, slot)
                v_e = act(u_e) * t_e
                changed_TF = changed_TF + weight_T1 * (v_e - v_TF).to(dtype)
            h2_TEr = project(self.drop(v_e, context), self.down_A.flatten(0, 1), dtype=dtype).view_as(h1_TEr)
            mixed_TEr = mixed_TEr + weight_T1[..., None] * slot[..., None] * h2_TEr
        with outside_autocast(x_TD.device.type):
            return changed_TF, self.scaling * (mixed_TEr.flatten(1) @ self.down_B.flatten(0, 1).to(dtype))

    def _lift(self, h_TEr: torch.Tensor, B_ErO: torch.Tensor, slot_TE: torch.Tensor) -> torch.Tensor:
        """(T, O) s B_e h_e of the expert that each token has in a slot."""
        own_TR = (h_TEr * slot_TE[..., None]).flatten(1)
        return self.scaling * (own_TR @ B_ErO.flatten(0, 1).to(h_TEr.dtype))


def _pair(
    num_experts: int, r: int, in_features: int, out_features: int, init_weights: bool | str
) -> tuple[nn.Parameter, nn.Parameter]:
    A = nn.Parameter(torch.empty(num_experts, r, in_features))
    B = nn.Parameter(torch.empty(num_experts, r, out_features))
    start_pair(A, B, init_weights)
    return A, B


def _slots(routing: Routing, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(T, E) one for the expert of each token, and (T, 1) its weight, of each slot; slots without one are zero."""
    weights_TK, num_experts = routing.weights.to(dtype), routing.num_experts
    for k in range(weights_TK.shape[1]):
        if routing.experts is None:
            slot_TE = weights_TK.new_zeros(1, num_experts)
            slot_TE[:, k] = 1
        else:
            slot_TE = one_hot(routing.experts[:, k], num_experts + 1, dtype)[:, :num_experts]
        yield slot_TE, weights_TK[:, k : k + 1]
