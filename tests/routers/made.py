"""Routers of the package's parts in float64, with an input, for the references."""

from __future__ import annotations

import torch

from moe_peft.routers import LinearRouter, Router
from moe_peft.types import TokenContext

D, E, T = 7, 4, 13
TRAINING = TokenContext(training=True)


def linear(select, gate=None, *, num_experts: int = E, num_tokens: int = T, **settings) -> tuple[Router, torch.Tensor]:
    """A router with linear scores of a random matrix, and a random input that is a leaf."""
    torch.manual_seed(0)
    made = LinearRouter(D, num_experts, select=select, gate=gate, **settings).double()
    torch.nn.init.normal_(made.weight, std=0.7)
    return made, torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)


def rows(table: list[list[torch.Tensor]]) -> torch.Tensor:
    """A matrix of 0-d tensors."""
    return torch.stack([torch.stack(row) for row in table])
