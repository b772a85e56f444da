"""Selectors: which experts a token uses, and with which weight, given scores and probabilities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from ..part import Part
from ..types import Routing, StepStatistics, TokenContext

# Weights are divided by no smaller sum of theirs: the gradient of a quotient by one has no finite value.
SMALLEST_SUM = 1e-20


class Selector(Part, ABC):
    """A rule without trained parameters.

    Attributes:
        extra_scores: Number m of further columns of scores that the rule reads, as for null experts or a threshold.
        gates_extra: Whether the gate function is over the E + m columns, or over the first E alone.
        extra_starts_at_zero: Whether a scorer is to start with further columns of zero.
        num_slots: K, columns of the decision; None where it has a weight for each expert, or their number varies.
        constant_for_one: Whether a single expert of probability one has the same weight for every token.
        counts: Whether it changes its tensors after each optimizer step, by what was decided in training passes.
    """

    counts: bool = False
    extra_scores: int = 0
    gates_extra: bool = False
    extra_starts_at_zero: bool = False
    num_slots: int | None = None
    constant_for_one: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let no class that decides in its own way inherit the short way to another rule's weights."""
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__ and "gates" not in cls.__dict__:
            cls.gates = Selector.gates  # type: ignore[method-assign]

    def tensors(self, num_experts: int) -> dict[str, torch.Tensor]:
        """Tensors by name that the rule reads or changes itself; the router saves them, and nothing trains them.

        Args:
            num_experts: E.
        """
        return {}

    def after_step(self, statistics: StepStatistics, **own: torch.Tensor) -> None:
        """Change the own tensors in place after an optimizer step; called where `counts`, without gradients.

        Args:
            statistics: What this place's router decided in the training passes of the step, of all processes.
            **own: The tensors of `tensors`, by name.
        """

    def gates(self, probs_TE: torch.Tensor) -> torch.Tensor | None:
        """The weights that a decision outside of training passes comes to, of rules with a short way to them.

        Args:
            probs_TE: (T, E) gate probabilities.

        Returns:
            (T, E) what `Routing.gate_matrix` gives of the decision; None where there is no shorter way.
        """
        return None

    @abstractmethod
    def __call__(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        context: TokenContext,
        num_experts: int,
        **own: torch.Tensor,
    ) -> Routing:
        """Decide about each token.

        Args:
            logits_TE: (T, E + m) router logits.
            probs_TE: (T, E) gate probabilities, or (T, E + m) where `gates_extra`.
            context: What is known about the tokens.
            num_experts: E.
            **own: The tensors of `tensors`, by name.

        Returns:
            The decision, before `routed_scaling_factor`.
        """
