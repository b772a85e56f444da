"""Localized balancing: even gate mass, shifted so that groups of experts serve groups of samples.

    Q_mn = mean over the valid tokens of sequence m of w_n
    I_mn = 1 + delta where expert n belongs to the group of sequence m, else 1 - delta
    Z = I * Q,   loss = var(Z) / mean(Z)^2               unbiased variance over all entries

LoRAMoE (arXiv 2312.09979; the authors' code uses the squared coefficient of variation). The minimum has Q
proportional to 1 / I: with the paper's sign a sample's own experts get (1 - delta) / (1 + delta) of the mass of the
others. Mode "specialize" swaps the sign, so that they get (1 + delta) / (1 - delta) times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ..messages import shown
from ..types import RouterLoss, Routing

MODES = ("paper", "specialize")


class LocalizedBalancing(RouterLoss):
    """Loss of one place; zero when Z is constant.

    Args:
        expert_groups: Group of each expert, length E; None for one group of all, which balances without localizing.
        delta: Strength of the shift, in [0, 1].
        mode: "paper" or "specialize", see the module.
        group_column: Batch column that carries the sample groups, for the error message.
    """

    config_fields: ClassVar[dict[str, str]] = {
        "expert_groups": "expert_groups",
        "delta": "localized_balancing_delta",
        "mode": "localized_balancing_mode",
        "group_column": "group_column",
    }

    additive = False  # a sequence's share of gate mass is not that of its slices

    def __init__(
        self,
        *,
        expert_groups: Sequence[int] | None = None,
        delta: float = 0.1,
        mode: str = "paper",
        group_column: str = "task_type",
    ) -> None:
        self.expert_groups = None if expert_groups is None else tuple(expert_groups)
        self.sign = 1.0 if mode == "paper" else -1.0
        self.delta = delta
        self.group_column = group_column
        self._groups_on: dict[torch.device, torch.Tensor] = {}

    def stacks_by(self) -> tuple:
        """The groups and their shift; see `RouterLoss.stacks_by`."""
        return (self.expert_groups, self.sign, self.delta, self.group_column)

    def sums(self, routing: Routing) -> torch.Tensor:
        """Sum over the entries of Z that count; sequences without a valid token do not.

        Args:
            routing: Any decision; its context carries the sequences and, where experts have groups, their groups.

        Returns:
            (..., 4) number n of entries, sum of Z - c, sum of (Z - c)^2, and n * c. The entries of a balanced routing
            are c = 1 / E, and the variance of small differences from c keeps its digits.

        Raises:
            ValueError: The experts have groups, but the batch brings none.
        """
        gates_TE, dim, context = routing.gate_matrix(), routing.token_dim, routing.context
        sequences_T, num_sequences = context.sequences, context.num_sequences
        if sequences_T is None:
            sequences_T = torch.zeros(gates_TE.shape[dim], dtype=torch.long, device=gates_TE.device)
        counts_T = torch.ones_like(sequences_T) if routing.valid is None else routing.valid.long()
        if routing.valid is not None:
            gates_TE = gates_TE.masked_fill(~routing.valid[:, None], 0.0)
        tokens_S = sequences_T.new_zeros(num_sequences).index_add(0, sequences_T, counts_T)
        mass_SE = gates_TE.new_zeros(*gates_TE.shape[:dim], num_sequences, routing.num_experts)
        mass_SE = mass_SE.index_add(dim, sequences_T, gates_TE)
        Z_SE = self._shift(routing) * mass_SE / tokens_S.clamp_min(1)[:, None]
        keep_S1 = (tokens_S > 0).to(Z_SE.dtype)[:, None]
        centre = 1.0 / routing.num_experts
        difference, count = ((Z_SE - centre) * keep_S1).flatten(-2), keep_S1.sum() * routing.num_experts
        total = difference.sum(-1)
        counts = [number.expand_as(total) for number in (count, count * centre)]
        return torch.stack([counts[0], total, difference.square().sum(-1), counts[1]], dim=-1)

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) unbiased variance over squared mean, of (..., 4) sums."""
        count, difference, square, centre = sums.unbind(-1)
        at_least_one = count.clamp_min(1)
        mean = (difference + centre) / at_least_one
        variance = (square - difference.square() / at_least_one) / (count - 1).clamp_min(1)
        return variance / (mean.square() + 1e-10)

    def _shift(self, routing: Routing) -> torch.Tensor | float:
        if self.expert_groups is None:
            return 1.0
        groups_S = routing.context.groups
        if groups_S is None:
            raise ValueError(
                f"Localized balancing with expert_groups={list(self.expert_groups)} needs the group of every sample, "
                f"but the batch has no column {shown(self.group_column)}. Pass {self.group_column}=<(batch,) "
                "integers> to the model's forward (with a trainer: add the column to the data set and call "
                "moe_peft.attach(trainer)), name another column in `group_column`, or set expert_groups=None to "
                "balance without groups."
            )
        device = groups_S.device
        if device not in self._groups_on:
            self._groups_on[device] = torch.tensor(self.expert_groups, device=device)
        matches_SE = groups_S[:, None] == self._groups_on[device][None, :]
        return 1.0 + self.sign * self.delta * (2.0 * matches_SE.to(routing.one.probs.dtype) - 1.0)
