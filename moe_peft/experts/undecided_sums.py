"""Sums of experts that need no decision, for passes in which nobody would see one.

A decision is several objects and, for sparse selectors, indices that a product over all experts does not read. In
decoding that is a good part of what a place costs.
"""

from __future__ import annotations

import torch

from ..part import ModulePart
from ..types import TokenContext


class UndecidedSums(ModulePart):
    """What a bank does without a decision; a kind that has a shorter way overrides these."""

    def add_all(
        self,
        x_TD: torch.Tensor,
        base_out_TO: torch.Tensor,
        weight: float,
        context: TokenContext,
        *,
        in_place: bool = False,
    ) -> torch.Tensor | None:
        """Add every expert with one weight, without a decision; for kinds that have a shorter way for it.

        Args:
            x_TD: (T, D) input, see `casts_input`.
            base_out_TO: (T, O) output of the frozen module.
            weight: Combine weight of every expert for every token.
            context: What is known about the tokens.
            in_place: Whether `base_out_TO` may be overwritten.

        Returns:
            (T, O) in the dtype of `base_out_TO`; None where there is no shorter way.
        """
        return None

    def takes_gates(self, x_TD: torch.Tensor, num_slots: int) -> bool:
        """Whether `add_gated` brings the experts into an output as well as a decision would.

        Args:
            x_TD: (T, D) input, see `casts_input`.
            num_slots: K, experts a token uses.
        """
        return False

    def add_gated(
        self,
        x_TD: torch.Tensor,
        base_out_TO: torch.Tensor,
        gates_TE: torch.Tensor,
        context: TokenContext,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Bring the experts into the base output by their weights alone, of kinds that say so in `takes_gates`.

        Args:
            x_TD: (T, D) input, see `casts_input`.
            base_out_TO: (T, O) output of the frozen module.
            gates_TE: (T, E) combine weights, zero where a token does not use an expert.
            context: What is known about the tokens, outside of a training pass.
            in_place: Whether `base_out_TO` may be overwritten.

        Returns:
            (T, O) in the dtype of `base_out_TO`.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a decision, not weights alone.")
