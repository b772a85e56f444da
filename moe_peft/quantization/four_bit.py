"""4-bit parameters of modules other than linear layers: quantized where they lie, dequantized where they are read."""

from __future__ import annotations

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
        storage: Dtype whose elements hold the 4-bit values.
        keeps: Whether the value that is read next is kept, as in a call of the parameter's module.
        kept: That value.
    """

    def __init__(self, quant_state: Any, storage: torch.dtype) -> None:
        super().__init__()
        self.quant_state, self.storage = quant_state, storage
        self.keeps = False
        self.kept: torch.Tensor | None = None

    @torch.no_grad()
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        kept = self.kept  # another thread's call may end meanwhile
        if kept is not None:
            return kept
        if packed.dtype != self.storage:
            raise TypeError(
                f"4-bit values stored as {self.storage} were cast to {packed.dtype}, which destroys them. Load the "
                "model again with bnb_4bit_quant_storage='uint8', which neither peft.prepare_model_for_kbit_training "
                "nor FSDP's mixed precision casts."
            )
        weight = dequantize_4bit(packed, self.quant_state)
        self.kept = weight if self.keeps else None
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> Dequantize:
        super()._apply(fn, recurse)
        self.keeps, self.kept = False, None
        self.quant_state.to(fn(self.quant_state.absmax.new_empty(0)).device)
        return self


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

    A call of the module, which may read its weights several times, as a loop over experts does, dequantizes once.

    Args:
        module: The module that owns the parameter.
        name: The parameter's name.
        packed: From `quantize`.
        quant_state: From `quantize`.
    """
    if not parametrize.is_parametrized(module):
        module.register_forward_pre_hook(_keep)
        # Recomputation of a checkpointed layer ends in an exception.
        module.register_forward_hook(_forget, always_call=True)
    setattr(module, name, packed)
    parametrize.register_parametrization(module, name, Dequantize(quant_state, packed.dtype), unsafe=True)


def dequantize(module: nn.Module, dtype: torch.dtype) -> None:
    """Put plain, frozen parameters in the place of a module's own 4-bit ones.

    Args:
        module: Any module; its children are left as they are.
        dtype: Of the parameters.
    """
    for name in _four_bit_parameters(module):
        weight = getattr(module, name)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))


def dtype_when_read(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's first 4-bit parameter once it is dequantized; None where there is no such parameter.

    Args:
        module: Any module, with its children.
    """
    first = next((part for part in module.modules() if isinstance(part, Dequantize)), None)
    return None if first is None else first.quant_state.dtype


def _four_bit_parameters(module: nn.Module) -> dict[str, Dequantize]:
    if not parametrize.is_parametrized(module):
        return {}
    lists: Any = module.parametrizations
    return {name: own[0] for name, own in lists.items() if isinstance(own[0], Dequantize)}


def _keep(module: nn.Module, *_: Any) -> None:
    for own in _four_bit_parameters(module).values():
        # A call that was interrupted may have left a value.
        own.keeps, own.kept = True, None


def _forget(module: nn.Module, *_: Any) -> None:
    for own in _four_bit_parameters(module).values():
        own.keeps, own.kept = False, None


def four_bit_bytes(numel: int, double_quant: bool = False) -> int:
    """Bytes of a tensor in 4 bits with its scales: 4.5 bits a weight, or 4.127 with double quantization.

    Args:
        numel: Number of weights.
        double_quant: Whether the scales are quantized too: a byte each instead of four, and four bytes for 256.
    """
    blocks = math.ceil(numel / BLOCK_SIZE)
    scales = blocks + 4 * math.ceil(blocks / STATISTICS_BLOCK_SIZE) if double_quant else 4 * blocks
    return math.ceil(numel / 2) + scales
