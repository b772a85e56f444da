"""A low-rank pair on each matrix of a backbone's own experts: W_e + s A_e' B_e (LoRA, arXiv 2106.09685, by expert)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..ops.expert_stacks import LowRankPairs
from ..part import ModulePart
from .products import pair_products
from .ranked import start_pair

# The matrices of an expert by the names that configurations and saved tensors use: the joined gate and up matrix (the
# up matrix of experts without a gate), and the down matrix.
MATRICES = ("gate_up", "down")


class ExpertPairs(ModulePart, nn.Module):
    """The pairs of one layer.

    Args:
        widths: Name of a matrix -> (I, O), widths of its input and output.
        num_experts: n, experts that have pairs.
        r: Rank.
        scaling: s.
        lora_dropout: Probability that an element of a matrix's input is dropped before A in training passes, for each
            slot apart.
        init_weights: See `start_pair`.

    Attributes:
        gate_up_A, down_A: (n, r, I).
        gate_up_B, down_B: (n, r, O).
        matrices: Names of the matrices that have pairs.
    """

    mergeable = True
    splits = True

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        *,
        num_experts: int,
        r: int,
        scaling: float,
        lora_dropout: float = 0.0,
        init_weights: bool | str = True,
    ) -> None:
        super().__init__()
        self.scaling, self.num_experts, self.r = scaling, num_experts, r
        self.matrices = tuple(widths)
        self.up = tuple(f"{name}_B" for name in widths)
        self.lora_dropout = nn.Dropout(lora_dropout)
        for name, (in_features, out_features) in widths.items():
            self.register_parameter(f"{name}_A", nn.Parameter(torch.empty(num_experts, r, in_features)))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.empty(num_experts, r, out_features)))
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool | str) -> None:
        """Initialise all pairs; see `start_pair` for the meaning of `init_weights`."""
        for name in self.matrices:
            start_pair(*self.pair(name), init_weights)

    def hold(self, num_experts: int) -> None:
        """See `ModulePart.hold`."""
        self.num_experts = num_experts

    def pair(self, matrix: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, r, I) and (n, r, O) of one matrix.

        Args:
            matrix: One of `matrices`.
        """
        A, B = getattr(self, f"{matrix}_A"), getattr(self, f"{matrix}_B")
        return A, B

    def forward(
        self, ids: tuple[int, ...] | None, table: torch.Tensor | None, training: bool = False
    ) -> dict[str, LowRankPairs]:
        """The pairs as the pass of expert LoRA reads them.

        Args:
            ids: Experts of the backbone that the pairs belong to, ascending; None for all.
            table: (E,) place of each expert among them; None with `ids`.
            training: Whether this is a training pass, in which dropout acts.

        Returns:
            By the name of the matrix.
        """
        dropout = self.lora_dropout if training and self.lora_dropout.p > 0 else None
        return {name: LowRankPairs(*self.pair(name), self.scaling, ids, table, dropout) for name in self.matrices}

    def delta(self, matrix: str, place: int) -> torch.Tensor:
        """What one expert's matrix in the orientation y = x W changes by: s A' B, (I, O) float32 or wider.

        Args:
            matrix: One of `matrices`.
            place: Place of the expert among those that have pairs.
        """
        A, B = self.pair(matrix)
        dtype = torch.promote_types(A.dtype, torch.float32)
        return self.scaling * (A[place].to(dtype).T @ B[place].to(dtype))

    def delta_products(self) -> torch.Tensor:
        """Inner products of what the experts' matrices change by, added up over the matrices.

        Returns:
            (n, n) float64, see `Experts.delta_products`.
        """
        return self.scaling**2 * sum((pair_products(*self.pair(name)) for name in self.matrices), torch.zeros(()))

    def extra_repr(self) -> str:
        """Say which matrices of how many experts have pairs."""
        return f"matrices={self.matrices}, num_experts={self.num_experts}, r={self.r}"
