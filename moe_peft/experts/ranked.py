"""What kinds of experts share that are made of pairs: a scale s, dropout of the input, and how a pair starts (LoRA).

y = base + s sum_e g_e (what expert e makes of dropout(x)),   A uniform, B zero   (Hu et al., arXiv 2106.09685)
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import nn

from ..types import TokenContext
from .experts import Experts


class _Sizes(TypedDict):
    num_experts: int
    scaling: float


class BankArgs(_Sizes, total=False):
    """Keywords of a bank of pairs, whatever they look like; see `RankedExperts`."""

    lora_dropout: float


class PairSizes(BankArgs):
    """And of one whose pairs have one rank."""

    r: int


class PairArgs(PairSizes, total=False):
    """And of one that starts all its pairs in one way; see `start_pair`."""

    init_weights: bool | str


class RankedExperts(Experts):
    """Base of banks that are made of pairs.

    Args:
        num_experts: E.
        scaling: s, the factor of the routed sum.
        lora_dropout: Probability that an input element is dropped in training passes; one mask for all experts.
    """

    fields: tuple[str, ...] = ("scaling", "lora_dropout", "init_weights")
    varies = frozenset({"lora_dropout"})

    def __init__(self, *, num_experts: int, scaling: float, lora_dropout: float = 0.0) -> None:
        super().__init__()
        self.num_choices, self.scaling = num_experts, scaling
        self.lora_dropout = nn.Dropout(lora_dropout)

    def drop(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Apply `lora_dropout` in training passes.

        Args:
            x: (..., D) what the experts read.
            context: What is known about the tokens.

        Returns:
            (..., D); `x` itself where nothing is dropped.
        """
        return self.lora_dropout(x) if self.drops(context) else x

    def drops(self, context: TokenContext) -> bool:
        """Whether `drop` acts in this pass: with `lora_dropout`, or in a way of a kind's own."""
        return context.training and (self.lora_dropout.p > 0 or type(self).drop is not RankedExperts.drop)


def start_pair(A: torch.Tensor, B: torch.Tensor, init_weights: bool | str) -> None:
    """Initialise down and up matrices.

    Args:
        A: (..., r, D) down matrices.
        B: (..., r, O) up matrices, stored transposed.
        init_weights: True: A uniform as in `nn.Linear`, B zero, so that the adapter starts as the identity.
            "gaussian": A normal with standard deviation 0.02, B zero. False: both uniform, for tests.
    """
    if init_weights == "gaussian":
        nn.init.normal_(A, std=0.02)
    else:
        # Each (r, D) slice is initialised as a Linear of its own; the fan of a 3-D tensor would be r * D.
        bound = math.sqrt(1.0 / A.shape[-1])
        nn.init.uniform_(A, -bound, bound)
    if init_weights is False:
        bound = math.sqrt(1.0 / B.shape[-2])
        nn.init.uniform_(B, -bound, bound)
    else:
        nn.init.zeros_(B)
