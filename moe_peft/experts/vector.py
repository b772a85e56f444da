"""Vector experts: y = u * (1 + sum_e g_e (l_e - 1)), scales of what a layer reads or writes (MoV, arXiv 2309.05444).

With weights that sum to one this is the paper's u * sum_e g_e l_e, and with a single vector (IA)3 (arXiv 2205.05638).
The residual form starts as the identity under any weights, also where only the k largest are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops import autocast_is_off, autocast_is_on, keeps_a_graph, outside_autocast, worth_a_function
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
    ones = ("vectors",)
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

    @torch.no_grad()
    def delta_products(self) -> torch.Tensor:
        """Inner products of the offsets l_e - 1; see `Experts.delta_products`."""
        offsets_EO = self.vectors.double() - 1
        return offsets_EO @ offsets_EO.T

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
        return self._scaled(base_out_TO, routing.gate_matrix())

    def takes_gates(self, x_TD: torch.Tensor, num_slots: int) -> bool:
        """Wherever they are combined as defined here; see `Experts.takes_gates`."""
        own = type(self)
        return own.combine is VectorExperts.combine and own.forward is Experts.forward

    def add_gated(
        self,
        x_TD: torch.Tensor,
        base_out_TO: torch.Tensor,
        gates_TE: torch.Tensor,
        context: TokenContext,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Scale the base output by weights of tokens, or of heads; arguments as in `combine`."""
        return self._scaled(base_out_TO, gates_TE)

    def _scaled(self, base_out_TO: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        dtype = base_out_TO.dtype
        # One is subtracted in the vectors' own precision, so that a fresh bank is exactly the identity.
        offsets, u = self.vectors - 1, base_out_TO
        plain = gates.dtype == offsets.dtype == dtype and self.num_heads == 1
        if plain and not torch.is_grad_enabled() and autocast_is_off():
            return torch.addcmul(u, u, gates @ offsets)
        gates, offsets = gates.to(dtype), offsets.to(dtype)
        if self.num_heads > 1:
            num_tokens, by_head = u.shape[0], (self.num_heads, offsets.shape[1] // self.num_heads)
            gates, u = gates.view(num_tokens, self.num_heads, gates.shape[-1]), u.view(num_tokens, *by_head)
            offsets = offsets.view(-1, *by_head)
        if torch.is_grad_enabled() and keeps_a_graph(u, gates, offsets) and worth_a_function(base_out_TO):
            scaled: torch.Tensor = _Scale.apply(u, gates, offsets)
        else:
            scaled = torch.addcmul(u, u, _mix(gates, offsets))
        return scaled if self.num_heads == 1 else scaled.reshape(base_out_TO.shape)


class _Scale(torch.autograd.Function):
    """u (1 + G L) for each head; G L is computed again in the backward pass, not saved, as it is as large as u.

    Shapes: u (T, O), gates G (T, E), offsets L (E, O); with heads u (T, H, O / H), G (T, H, E), L (E, H, O / H).
    """

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, gates: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(u, gates, offsets)
        return torch.addcmul(u, u, _mix(gates, offsets))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, gates, offsets = ctx.saved_tensors
        (grad,) = gradients
        needs_u, needs_gates, needs_offsets = ctx.needs_input_grad
        of_gates = of_offsets = None
        of_u = torch.addcmul(grad, grad, _mix(gates, offsets)) if needs_u else None
        of_mix = _by_head(grad * u)
        with outside_autocast(u.device.type):
            if needs_gates:
                of_gates = _by_head(of_mix @ _by_head(offsets).mT)
            if needs_offsets:
                of_offsets = _by_head(_by_head(gates).mT @ of_mix)
        return of_u, of_gates, of_offsets


def _mix(gates: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    if not autocast_is_on(gates.device.type):
        return _by_head(_by_head(gates) @ _by_head(offsets))
    with outside_autocast(gates.device.type):
        return _by_head(_by_head(gates) @ _by_head(offsets))


def _by_head(tensor: torch.Tensor) -> torch.Tensor:
    """The heads first, for a product of each, and back again; a tensor without heads as it is."""
    return tensor if tensor.dim() == 2 else tensor.transpose(0, 1)
