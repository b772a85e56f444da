"""Vector experts: y = u * (1 + sum_e g_e (l_e - 1)), scales of what a layer reads or writes (MoV, arXiv 2309.05444).

With weights that sum to one this is the paper's u * sum_e g_e l_e, and with a single vector (IA)3 (arXiv 2205.05638).
The residual form starts as the identity under any weights, also where only the k largest are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops import outside_autocast
from ..types import Routing, TokenContext
from .experts import Experts


class VectorExperts(Experts):
    """A bank of vectors that multiply what they are given.

    Args:
        in_features: Taken for the signature that kinds of experts share.
        out_features: O, width of what is scaled.
        num_experts: E.
        num_heads: Heads that are routed apart; a token then has one decision for each.
        scales_input: Whether a layer is to scale its input, instead of its output.
        router_reads_hidden: Whether the router is to read the layer's input, instead of what is scaled.
        init_weights: True: ones. False: normal around one with standard deviation 0.5, for tests.

    Attributes:
        vectors: (E, O), float32 in a 16-bit model too: near one, 16 bit has no room for small steps.
        mergeable: Under constant weights they are a constant scale of what the layer reads or writes.
    """

    fields: tuple[str, ...] = ("init_weights",)
    keeps_float32 = True
    mergeable = True

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
        self.num_choices = num_experts
        self.num_heads = num_heads
        self.scales_input = scales_input
        self.router_reads_hidden = router_reads_hidden
        self.vectors = nn.Parameter(torch.ones(num_experts, out_features))
        if init_weights is False:
            nn.init.normal_(self.vectors, mean=1.0, std=0.5)

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """See `Experts.shapes`."""
        return {"vectors": (num_experts,)}

    def prepare(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """The input as it is, of which vectors make nothing; arguments as in `Experts.prepare`."""
        return x_TD

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Scale the base output.

        Args:
            h: Not used.
            base_out_TO: (T, O) what is scaled.
            routing: Decision for the T tokens, or for their T * num_heads heads, the heads of a token together.
            in_place: Not used, as the gradient needs what is scaled.

        Returns:
            (T, O) in the dtype of `base_out_TO`.
        """
        num_tokens, dtype = base_out_TO.shape[0], base_out_TO.dtype
        num_experts, width = self.vectors.shape
        by_head = (self.num_heads, width // self.num_heads)
        gates = routing.gate_matrix().to(dtype).view(num_tokens, self.num_heads, num_experts)
        # One is subtracted in the vectors' own precision, so that a fresh bank is exactly the identity.
        offsets = (self.vectors - 1).to(dtype).view(num_experts, *by_head)
        scaled: torch.Tensor = _Scale.apply(base_out_TO.view(num_tokens, *by_head), gates, offsets)
        return scaled.reshape(num_tokens, width)


class _Scale(torch.autograd.Function):
    """u (1 + G L) for each head; G L is computed again in the backward pass, not saved, as it is as large as u.

    Shapes: u (T, H, O / H), gates G (T, H, E), offsets L (E, H, O / H).
    """

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, gates: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(u, gates, offsets)
        return torch.addcmul(u, u, _mix(gates, offsets))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        u, gates, offsets = ctx.saved_tensors
        grad_u = torch.addcmul(grad, grad, _mix(gates, offsets))
        grad_mix = grad * u
        with outside_autocast(u.device.type):
            grad_gates = torch.einsum("thd,ehd->the", grad_mix, offsets)
            grad_offsets = torch.einsum("the,thd->ehd", gates, grad_mix)
        return grad_u, grad_gates, grad_offsets


def _mix(gates: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    with outside_autocast(gates.device.type):
        return torch.einsum("the,ehd->thd", gates, offsets)
