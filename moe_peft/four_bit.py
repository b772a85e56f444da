"""4-bit parameters of modules other than linear layers: quantized where they lie, dequantized where they are read."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

BLOCK_SIZE = 64
# Values of the first statistics that share one of the second, with double quantization.
STATISTICS_BLOCK_SIZE = 256


class Dequantize(nn.Module):
    """Gives a quantized parameter back in its own shape and dtype.

    Attributes:
        quant_state: bitsandbytes' scales, shape and dtype. No buffers: they move with the module, but are never cast.
    """

    def __init__(self, quant_state: Any) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(packed, self.quant_state)

    def _apply(self, fn: Any, recurse: bool = True) -> Dequantize:
        super()._apply(fn, recurse)
        self.quant_state.to(fn(self.quant_state.absmax.new_empty(0)).device)
        return self


class _OnceInACall:
    """Hooks of a module that reads its weights several times in one call, as a loop over experts does."""

    def __init__(self) -> None:
        self.entered: list[contextlib.AbstractContextManager] = []

    def enter(self, *_: Any) -> None:
        cache = parametrize.cached()
        cache.__enter__()
        self.entered.append(cache)

    def leave(self, *_: Any) -> None:
        # A call that failed before the first hook has entered nothing.
        if self.entered:
            self.entered.pop().__exit__(None, None, None)


def quantize(
    weight: torch.Tensor,
    quant_type: str = "nf4",
    double_quant: bool = False,
    storage: torch.dtype = torch.uint8,
) -> tuple[nn.Parameter, Any]:
    """Quantize a tensor where it lies.

    Args:
        weight: Floating tensor of any shape, on any device that bitsandbytes supports.
        quant_type: "nf4" or "fp4".
        double_quant: Quantize the blocks' scales too.
        storage: Dtype whose elements hold the 4-bit values; FSDP shards parameters of one dtype only.

    Returns:
        The 4-bit values, frozen, and their `QuantState`.
    """
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.detach().contiguous(),
        blocksize=BLOCK_SIZE,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
    )
    return nn.Parameter(packed, requires_grad=False), state


def dequantize_on_read(module: nn.Module, name: str, packed: nn.Parameter, quant_state: Any) -> None:
    """Put 4-bit values in the place of a module's own parameter; `getattr(module, name)` then dequantizes them.

    Args:
        module: The module that owns the parameter.
        name: The parameter's name.
        packed: From `quantize`.
        quant_state: From `quantize`.
    """
    if not parametrize.is_parametrized(module):
        calls = _OnceInACall()
        module.register_forward_pre_hook(calls.enter)
        # Recomputation of a checkpointed layer ends in an exception, after which the cache must be left all the same.
        module.register_forward_hook(calls.leave, always_call=True)
    setattr(module, name, packed)
    parametrize.register_parametrization(module, name, Dequantize(quant_state), unsafe=True)


def four_bit_bytes(numel: int, double_quant: bool = False) -> int:
    """Bytes of a tensor in 4 bits with its scales: 4.5 bits a weight, or 4.127 with double quantization.

    Args:
        numel: Number of weights.
        double_quant: Whether the scales are quantized too: a byte each instead of four, and four bytes for 256.
    """
    blocks = math.ceil(numel / BLOCK_SIZE)
    scales = blocks + 4 * math.ceil(blocks / STATISTICS_BLOCK_SIZE) if double_quant else 4 * blocks
    return math.ceil(numel / 2) + scales
