"""Gate functions: how the scores of a token's experts become probabilities."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..part import Part
from ..types import TokenContext


class Gate(Part, ABC):
    """A function of the scores without parameters.

    Attributes:
        sums_to_one: Whether the probabilities of a token always sum to one.
        needs_positive: Whether scores at or below zero get no probability and no gradient.
    """

    sums_to_one: bool = False
    needs_positive: bool = False

    @abstractmethod
    def __call__(self, logits_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Turn scores into probabilities.

        Args:
            logits_TE: (T, E) float32 scores, with the further columns that a selector has put under the gate.
            context: What is known about the tokens.

        Returns:
            The same shape, not negative.
        """


class Softmax(Gate):
    """p = softmax(z)."""

    sums_to_one = True

    def __call__(self, logits_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Turn scores into probabilities; arguments as in `Gate`."""
        return logits_TE.softmax(dim=-1)
