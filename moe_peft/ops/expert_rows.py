"""Ways to multiply the rows of slots by the matrices of their experts, and the choice among them.

    segment   slots sorted by expert, one product for each expert that has some          any dtype, packed matrices
    slots     one product for each slot, without sorting or copying matrices             few slots, no gradient
    grouped   slots sorted by expert, one grouped product                                16 and 32 bit
    gather    each slot's matrices copied, one batched product                           few slots, fixed shapes

All give the same numbers. N = T * K is the number of slots; other suffixes as in `expert_stacks`.
"""

from __future__ import annotations

from typing import Any

import torch

from .expert_stacks import AdaptedMatrix, LowRankPairs, Stack
from .grouped import grouped_mm, padded_rank

# Slots up to which a loop over slots, or a copy of their matrices, beats sorting them.
FEW_SLOTS = 16


class Rows:
    """Slots in the order in which a way works on them.

    Args:
        index_TK: (T, K) int64 expert of each slot, all below E.
        num_experts: E.
    """

    def __init__(self, index_TK: torch.Tensor, num_experts: int) -> None:
        self.num_tokens, self.num_slots = index_TK.shape
        self.num_experts = num_experts
        self.experts_N, self.order_N = torch.sort(index_TK.reshape(-1), stable=True)
        counted = torch.arange(num_experts, device=index_TK.device)
        self.ends_E = torch.searchsorted(self.experts_N, counted, right=True, out_int32=True)

    def take(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The (N, D) input row of each slot, in order."""
        return hidden_TD.index_select(0, self.order_N // self.num_slots)

    def linear(self, x_NI: torch.Tensor, matrix: AdaptedMatrix) -> torch.Tensor:
        """Each row times its expert's adapted matrix, (N, O)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it multiplies.")

    def sum_slots(self, y_NO: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The (T, O) weighted sum of each token's slots, added up in the order of the slots."""
        weighted_NO = y_NO * weights_TK.reshape(-1)[self.order_N][:, None]
        back_N = torch.empty_like(self.order_N)
        back_N[self.order_N] = torch.arange(len(back_N), device=back_N.device)
        return weighted_NO.index_select(0, back_N).view(self.num_tokens, self.num_slots, -1).sum(1)


class SegmentRows(Rows):
    """One product for each expert that has rows; reads the counts, so it waits for a device."""

    def __init__(self, index_TK: torch.Tensor, num_experts: int) -> None:
        super().__init__(index_TK, num_experts)
        ends = self.ends_E.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.hit = [expert for expert, size in enumerate(sizes) if size]
        self.sizes = [sizes[expert] for expert in self.hit]

    def linear(self, x_NI: torch.Tensor, matrix: AdaptedMatrix) -> torch.Tensor:
        """See `Rows.linear`."""
        stack = matrix.stack
        matrices = () if stack.packed else stack.unbind()
        biases = None if matrix.bias is None else matrix.bias.unbind(0)
        pairs = [(own, own.A.unbind(0), own.B.unbind(0)) for own in (p.read(stack.dtype) for p in matrix.pairs)]
        outs = []
        # Splitting, not slicing: a slice's backward makes a tensor of the size of x.
        for expert, rows in zip(self.hit, x_NI.split(self.sizes), strict=True):
            out = _read_again(rows, stack, expert) if stack.packed else rows @ matrices[expert]
            if biases is not None:
                out = out + biases[expert].to(out.dtype)
            for own, A, B in pairs:
                place = own.place(expert)
                if place is not None:
                    out = out.addmm_(own.drop(rows) @ A[place].T, B[place], alpha=own.scaling)
            outs.append(out)
        out_NO = torch.cat(outs)
        missed = [own for own, _, _ in pairs if own.ids is not None and not set(own.ids) & set(self.hit)]
        return _touch(out_NO, missed) if missed and torch.is_grad_enabled() else out_NO


class SlotRows(Rows):
    """One product for each slot, in the order of the slots; what few slots use is read, and nothing else."""

    def __init__(self, index_TK: torch.Tensor, num_experts: int) -> None:
        self.num_tokens, self.num_slots = index_TK.shape
        self.experts_N = index_TK.reshape(-1)

    def take(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """See `Rows.take`."""
        return hidden_TD if self.num_slots == 1 else hidden_TD.repeat_interleave(self.num_slots, dim=0)

    def linear(self, x_NI: torch.Tensor, matrix: AdaptedMatrix) -> torch.Tensor:
        """See `Rows.linear`."""
        out_NO = self.products(x_NI, matrix.stack)
        if matrix.bias is not None:
            out_NO = out_NO + matrix.bias[self.experts_N].to(out_NO.dtype)
        for own in matrix.pairs:
            places_N = self.experts_N if own.table is None else own.table[self.experts_N]
            kept_N = places_N.clamp(max=own.A.shape[0] - 1)
            h_Nr = _batched(own.drop(x_NI), own.A.index_select(0, kept_N).to(x_NI.dtype).transpose(1, 2))
            if own.table is not None:
                h_Nr = h_Nr.masked_fill((places_N > kept_N)[:, None], 0.0)
            out_NO = out_NO.add_(_up(h_Nr, own.B, kept_N), alpha=own.scaling)
        return out_NO

    def products(self, x_NI: torch.Tensor, stack: Stack) -> torch.Tensor:
        """The (N, O) products with the frozen matrices."""
        rows = zip(self.experts_N.tolist(), x_NI, strict=True)
        return torch.stack([stack.product(expert, row_I) for expert, row_I in rows])

    def sum_slots(self, y_NO: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """See `Rows.sum_slots`."""
        return (y_NO.view(self.num_tokens, self.num_slots, -1) * weights_TK[..., None]).sum(1)


class GatherRows(SlotRows):
    """One batched product of copied matrices."""

    def products(self, x_NI: torch.Tensor, stack: Stack) -> torch.Tensor:
        """See `SlotRows.products`."""
        return _batched(x_NI, stack.matrices()[self.experts_N])


class GroupedRows(Rows):
    """One grouped product for all experts; no shape depends on the routing, but where few experts have pairs."""

    def __init__(self, index_TK: torch.Tensor, num_experts: int) -> None:
        super().__init__(index_TK, num_experts)
        self._few: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def linear(self, x_NI: torch.Tensor, matrix: AdaptedMatrix) -> torch.Tensor:
        """See `Rows.linear`."""
        stack = matrix.stack
        out_NO = grouped_mm(x_NI, stack.matrices(), self.ends_E)
        if matrix.bias is not None:
            out_NO = out_NO + matrix.bias[self.experts_N].to(out_NO.dtype)
        for own in (p.read(stack.dtype) for p in matrix.pairs):
            if own.table is None:
                out_NO = out_NO.add_(self._pairs(own, own.drop(x_NI), self.ends_E), alpha=own.scaling)
            elif torch.compiler.is_compiling() or x_NI.device.type != "cpu":
                every = self._with_empty_pairs(own)
                out_NO = out_NO.add_(self._pairs(every, own.drop(x_NI), self.ends_E), alpha=own.scaling)
            else:
                # Rows are copied, so that only these are kept for the backward.
                few_M, ends_n = self._rows_with_pairs(own)
                added = self._pairs(own, own.drop(x_NI.index_select(0, few_M)), ends_n)
                out_NO = out_NO.index_add_(0, few_M, added, alpha=own.scaling)
        return out_NO

    @staticmethod
    def _pairs(own: LowRankPairs, x_NI: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        A, B = padded_rank(own.A, own.B)
        return grouped_mm(grouped_mm(x_NI, A.transpose(1, 2), ends), B, ends)

    def _rows_with_pairs(self, own: LowRankPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows whose expert has a pair, and where each such expert's rows end among them."""
        assert own.table is not None
        key = own.table.data_ptr()
        if key not in self._few:
            count = own.A.shape[0]
            places_N = own.table[self.experts_N]
            few_M = (places_N < count).nonzero().squeeze(1)
            counted = torch.arange(count, device=few_M.device)
            self._few[key] = few_M, torch.searchsorted(places_N[few_M], counted, right=True, out_int32=True)
        return self._few[key]

    def _with_empty_pairs(self, own: LowRankPairs) -> LowRankPairs:
        """A pair for every expert, zero where it has none, so that no shape depends on the routing."""
        ids = torch.tensor(own.ids, dtype=torch.long, device=own.A.device)
        A = own.A.new_zeros(self.num_experts, *own.A.shape[1:]).index_copy(0, ids, own.A[: len(ids)])
        B = own.B.new_zeros(self.num_experts, *own.B.shape[1:]).index_copy(0, ids, own.B[: len(ids)])
        return LowRankPairs(A, B, own.scaling)


PATHS: dict[str, type[Rows]] = {
    "segment": SegmentRows,
    "slots": SlotRows,
    "grouped": GroupedRows,
    "gather": GatherRows,
}


def choose_path(num_slots: int, stack: Stack) -> str:
    """Choose a way.

    Args:
        num_slots: N.
        stack: The first matrices.

    Returns:
        A key of `PATHS`.
    """
    few = num_slots <= FEW_SLOTS
    if stack.packed:
        return "slots" if few and not torch.is_grad_enabled() else "segment"
    if torch.compiler.is_compiling():
        return "gather" if few else "grouped"
    if few and not torch.is_grad_enabled():
        return "slots" if stack.device.type == "cpu" else "gather"
    return "segment" if stack.dtype == torch.float64 else "grouped"


class _ReadAgain(torch.autograd.Function):
    """x W_e for a packed W_e, which the backward reads again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, stack: Stack, expert: int) -> torch.Tensor:
        ctx.stack, ctx.expert = stack, expert
        return rows @ stack.matrix(expert)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.stack.matrix(ctx.expert).T, None, None


def _read_again(rows: torch.Tensor, stack: Stack, expert: int) -> torch.Tensor:
    if torch.is_grad_enabled() and rows.requires_grad:
        return _ReadAgain.apply(rows, stack, expert)
    return rows @ stack.matrix(expert)


def _touch(out: torch.Tensor, pairs: list[LowRankPairs]) -> torch.Tensor:
    """Make an output depend on pairs that none of its rows used: their gradient is zero, not missing."""
    nothing = [factor.flatten()[:0].sum() for own in pairs for factor in (own.A, own.B)]
    return out + torch.stack(nothing).sum().to(out.dtype)


def _up(h_Nr: torch.Tensor, B: torch.Tensor, places_N: torch.Tensor) -> torch.Tensor:
    """Each slot's ranks times the up matrix at its place in B, (N, O)."""
    if B.stride(0) != 1 or torch.is_grad_enabled():
        return _batched(h_Nr, B.index_select(0, places_N).to(h_Nr.dtype))
    # Experts lie side by side: what the slots use is read row by row.
    columns_OrN = B.permute(2, 1, 0).index_select(2, places_N).to(torch.promote_types(B.dtype, torch.float32))
    return (columns_OrN * h_Nr.T).sum(1).T.to(h_Nr.dtype)


def _batched(x_NI: torch.Tensor, matrices_NIO: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x_NI[:, None], matrices_NIO).squeeze(1)
