"""The matrices of 4-bit experts, dequantized one expert at a time where they are used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


class PackedStack:
    """A 4-bit tensor of experts, as `ops.expert_stacks.Stack` describes it.

    Args:
        values: The 4-bit values.
        quant_state: bitsandbytes' scales, shape and dtype.
        is_transposed: Whether the input's width comes first.
        num_experts: E; None takes all of the tensor's.
    """

    packed = True

    def __init__(
        self, values: torch.Tensor, quant_state: Any, *, is_transposed: bool, num_experts: int | None = None
    ) -> None:
        self.values, self.quant_state, self.is_transposed = values, quant_state, is_transposed
        self.shape: tuple[int, ...] = tuple(quant_state.shape)
        self.num_experts = self.shape[0] if num_experts is None else num_experts
        self.dtype, self.device = quant_state.dtype, values.device
        self._scales: torch.Tensor | None = None

    def matrices(self) -> torch.Tensor:
        """All matrices, (E, I, O)."""
        return torch.stack(self.unbind())

    def unbind(self) -> tuple[torch.Tensor, ...]:
        """All matrices one by one."""
        return tuple(self.matrix(expert) for expert in range(self.num_experts))

    @torch.no_grad()
    def matrix(self, expert: int) -> torch.Tensor:
        """One expert's matrix, (I, O); equal to the last bit to that of the whole tensor dequantized.

        Blocks of values share a scale, and may reach over an expert's ends: those that it lies in are dequantized.
        """
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state, size = self.quant_state, math.prod(self.shape[1:])
        start, total = expert * size, math.prod(self.shape)
        first, last = start // state.blocksize, -(-(start + size) // state.blocksize)
        begin, end = first * state.blocksize, min(last * state.blocksize, total)
        values = self.values.detach().reshape(-1).view(torch.uint8)[begin // 2 : -(-end // 2)]
        of_blocks = QuantState(
            absmax=self._all_scales()[first:last],
            shape=torch.Size((end - begin,)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        weight = dequantize_4bit(values[:, None], of_blocks).reshape(-1)
        own = weight[start - begin :][:size].view(self.shape[1:])
        return own if self.is_transposed else own.T

    def product(self, expert: int, row_I: torch.Tensor) -> torch.Tensor:
        """One row times one expert's matrix, (O,)."""
        return torch.mv(self.matrix(expert).T, row_I)

    def _all_scales(self) -> torch.Tensor:
        """A float32 scale for each block, also where the scales are quantized themselves."""
        if self._scales is None:
            from bitsandbytes.functional import dequantize_blockwise

            state = self.quant_state
            nested = getattr(state, "nested", False)
            scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
            self._scales = scales.float()
        return self._scales


def packed_stack(
    module: nn.Module, name: str, *, is_transposed: bool, num_experts: int | None = None
) -> PackedStack | None:
    """Read a parameter that is kept in 4 bits, without dequantizing it.

    Args:
        module: The module that owns it.
        name: The parameter's name.
        is_transposed: Whether the input's width comes first.
        num_experts: Experts to read; None for all.

    Returns:
        None where the parameter is kept in another form, or is changed further after it is dequantized.

    Raises:
        TypeError: The 4-bit values were cast, which destroys them.
    """
    if not parametrize.is_parametrized(module, name):
        return None
    own: Any = module.parametrizations[name]  # type: ignore[index]
    state = getattr(own[0], "quant_state", None)
    if len(own) != 1 or state is None:
        return None
    values = own.original
    if values.dtype != getattr(own[0], "storage", values.dtype):
        own[0](values)  # says what was cast
    return PackedStack(values, state, is_transposed=is_transposed, num_experts=num_experts)
