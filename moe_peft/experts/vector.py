"""Vector experts: y = u * (1 + sum_e g_e (l_e - 1)), scales of a layer's output (MoV, arXiv 2309.05444; (IA)3).

With weights that sum to one this is the paper's u * sum_e g_e l_e. The residual form starts as the identity under any
weights, also where only the k largest are kept.
"""

from __future__ import annotations

import torch
from torch import nn

from ..types import Routing


class VectorExperts(nn.Module):
    """A bank of vectors that multiply what they are given.

    Args:
        in_features: Taken for the signature that kinds of experts share.
        out_features: O, width of what is scaled.
        num_experts: E.
        num_heads: Heads that are routed apart; a token then has one decision for each.
        scales_input: Whether a layer is to scale its input, instead of its output.
        router_reads_hidden: Whether the router is to read the layer's input, instead of what is scaled.
        init_weights: Anything but False: ones. False: normal around one with standard deviation 0.5, for tests.

    Attributes:
        vectors: (E, O).
        mergeable: Whether the experts add a matrix to the base weight; they multiply it.
    """

    fields: tuple[str, ...] = ("init_weights",)
    mergeable = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        num_heads: int = 1,
        scales_input: bool = False,
        router_reads_hidden: bool = False,
        init_weights: bool | str = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scales_input = scales_input
        self.router_reads_hidden = router_reads_hidden
        self.vectors = nn.Parameter(torch.ones(num_experts, out_features))
        if init_weights is False:
            nn.init.normal_(self.vectors, mean=1.0, std=0.5)

    def forward(
        self, x_TD: torch.Tensor | None, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Scale the base output.

        Args:
            x_TD: Not used; taken for the signature that kinds of experts share.
            base_out_TO: (T, O) what is scaled.
            routing: Decision for the T tokens, or for their T * num_heads heads, the heads of a token together.
            in_place: Not used.

        Returns:
            (T, O) in the dtype of `base_out_TO`.
        """
        return base_out_TO * self.scales(routing, base_out_TO.dtype)

    def scales(self, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
        """The mixed vectors.

        Args:
            routing: As in `forward`.
            dtype: Dtype of the result.

        Returns:
            (T, O).
        """
        num_experts, width = self.vectors.shape
        gates = routing.gate_matrix().to(dtype).view(-1, self.num_heads, num_experts)
        # One is subtracted in the vectors' own precision, so that a fresh bank is exactly the identity.
        offsets = (self.vectors - 1).to(dtype).view(num_experts, self.num_heads, -1)
        with torch.autocast(gates.device.type, enabled=False):
            return 1 + torch.einsum("the,ehd->thd", gates, offsets).reshape(-1, width)
