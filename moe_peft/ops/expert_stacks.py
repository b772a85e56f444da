"""The matrices of fused experts and the low-rank pairs on them, as the pass of `expert_lora` reads them.

Shape suffixes: E experts, n experts with a pair, I width of a matrix's input, O of its output, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


class Stack(Protocol):
    """One matrix of each of E experts, in the orientation y = x W.

    Attributes:
        num_experts: E.
        dtype: Of the matrices once they are read.
        device: Where they lie.
        packed: Whether reading a matrix computes it, so that it should be read again rather than kept.
    """

    num_experts: int
    dtype: torch.dtype
    device: torch.device
    packed: bool

    def matrices(self) -> torch.Tensor:
        """All matrices, (E, I, O)."""
        ...

    def unbind(self) -> tuple[torch.Tensor, ...]:
        """The matrices one by one, E of (I, O); for stacks that are not packed."""
        ...

    def matrix(self, expert: int) -> torch.Tensor:
        """One expert's matrix, (I, O), outside of any autograd graph."""
        ...

    def product(self, expert: int, row_I: torch.Tensor) -> torch.Tensor:
        """One row times one expert's matrix, (O,), without gradients."""
        ...


class PlainStack:
    """A floating tensor that holds the matrices as they are.

    Args:
        weight: (E, O, I), or (E, I, O) where `is_transposed`; experts beyond `num_experts` are left out.
        is_transposed: Whether the input's width comes first, as in gpt-oss.
        num_experts: E; None takes all of the tensor's.
    """

    packed = False

    def __init__(self, weight: torch.Tensor, *, is_transposed: bool, num_experts: int | None = None) -> None:
        self.num_experts = weight.shape[0] if num_experts is None else num_experts
        self.dtype, self.device = weight.dtype, weight.device
        own = weight if weight.shape[0] == self.num_experts else weight[: self.num_experts]
        self._stored, self._is_transposed = own, is_transposed
        self._matrices = own if is_transposed else own.transpose(1, 2)

    def matrices(self) -> torch.Tensor:
        """See `Stack.matrices`."""
        return self._matrices

    def unbind(self) -> tuple[torch.Tensor, ...]:
        """See `Stack.unbind`: not by indices, whose backward makes a tensor of the stack's size for each."""
        return self._matrices.unbind(0)

    def matrix(self, expert: int) -> torch.Tensor:
        """See `Stack.matrix`."""
        return self._matrices[expert].detach()

    def product(self, expert: int, row_I: torch.Tensor) -> torch.Tensor:
        """See `Stack.product`."""
        stored = self._stored[expert]
        return torch.mv(stored.T if self._is_transposed else stored, row_I)


@dataclass(frozen=True)
class LowRankPairs:
    """A pair (A, B) on one matrix of each expert, or of some: W_e + s A_e' B_e in the orientation y = x W.

    Attributes:
        A: (n, r, I).
        B: (n, r, O).
        scaling: s.
        ids: The experts that have a pair, ascending, n or fewer; None where all have (n = E).
        table: (E,) int64, place of each expert among `ids`, n where it has none; None with `ids`.
        dropout: Applied to the rows before A.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    ids: tuple[int, ...] | None = None
    table: torch.Tensor | None = None
    dropout: nn.Module | None = None

    def read(self, dtype: torch.dtype) -> LowRankPairs:
        """The same pairs in the dtype of the matrices that they stand beside."""
        if self.A.dtype == self.B.dtype == dtype:
            return self
        return LowRankPairs(self.A.to(dtype), self.B.to(dtype), self.scaling, self.ids, self.table, self.dropout)

    def drop(self, x_NI: torch.Tensor) -> torch.Tensor:
        """Rows as A reads them."""
        return x_NI if self.dropout is None else self.dropout(x_NI)

    def place(self, expert: int) -> int | None:
        """Where an expert's pair lies; None where it has none."""
        if self.ids is None:
            return expert
        return self.ids.index(expert) if expert in self.ids else None


@dataclass(frozen=True)
class AdaptedMatrix:
    """One of the matrices of fused experts, with what is added to its product.

    Attributes:
        stack: The frozen matrices.
        bias: (E, O), or None.
        pairs: Of the active adapters.
    """

    stack: Stack
    bias: torch.Tensor | None = None
    pairs: tuple[LowRankPairs, ...] = ()


@dataclass(frozen=True)
class FusedExperts:
    """Experts whose matrices are stacked: out = sum_k w_k norm(gate(x W1_{i_k}) W2_{i_k}).

    Attributes:
        first: W1, the joined gate and up matrix, or the up matrix of experts without a gate.
        down: W2.
        gate: (N, O of W1) -> (N, I of W2), the elementwise function between them.
        norm: Applied to every expert's output before the combine weight; None for none.
        identity_beyond: Whether an index of E or more stands for an expert that returns its input, not for none.
    """

    first: AdaptedMatrix
    down: AdaptedMatrix
    gate: Callable[[torch.Tensor], torch.Tensor]
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    identity_beyond: bool = False

    @property
    def num_experts(self) -> int:
        """E, the experts that have a matrix."""
        return self.down.stack.num_experts
