"""Tensors of -s, 0 and s: chosen from one of any values, and packed into bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Ternary:
    """A tensor of three values.

    Attributes:
        signs: int8 of -1, 0 and 1, in the tensor's shape.
        scale: s, 1 or more digits of float32.
    """

    signs: torch.Tensor
    scale: float

    def dense(self) -> torch.Tensor:
        """The tensor, float32."""
        return self.signs.float() * torch.tensor(self.scale, dtype=torch.float32)


def ternary(change: torch.Tensor, density: float, alpha: float | None) -> Ternary:
    """Keep the entries of largest magnitude, by their sign alone.

    Args:
        change: Any floating point tensor.
        density: Share of the entries that are kept, one at least; zeros are not.
        alpha: The scale is alpha times the standard deviation of all entries; None takes the mean magnitude of the
            kept ones, which has the least error.
    """
    flat = change.detach().double().cpu().flatten()
    order = flat.abs().argsort(descending=True, stable=True)[: max(1, math.ceil(density * len(flat)))]
    signs = torch.zeros(len(flat), dtype=torch.int8)
    signs[order] = flat[order].sign().to(torch.int8)
    kept = flat[signs != 0].abs()
    scale = float(kept.mean()) if alpha is None else alpha * float(flat.std(unbiased=False))
    return Ternary(signs.view(change.shape), float(torch.tensor(scale, dtype=torch.float32)))


def packed(tensor: Ternary) -> dict[str, torch.Tensor]:
    """A tensor as bits.

    Args:
        tensor: Of three values.

    Returns:
        "mask", uint8 with a bit for each entry that says whether it is kept; "sign", uint8 with a bit for each kept
        entry that says whether it is positive; "scale", (1,) float32.
    """
    flat = tensor.signs.flatten().numpy()
    kept = flat != 0
    return {
        "mask": torch.from_numpy(np.packbits(kept)),
        "sign": torch.from_numpy(np.packbits(flat[kept] > 0)),
        "scale": torch.tensor([tensor.scale], dtype=torch.float32),
    }


def unpacked(parts: Mapping[str, torch.Tensor], shape: torch.Size) -> Ternary:
    """The tensor again.

    Args:
        parts: What `packed` returned.
        shape: Of the tensor.

    Raises:
        ValueError: The bits are not those of a tensor of that shape.
    """
    count = shape.numel()
    mask, sign, scale = (parts[name] for name in ("mask", "sign", "scale"))
    if mask.dtype != torch.uint8 or sign.dtype != torch.uint8 or len(mask) != -(-count // 8):
        raise ValueError(f"the mask has {len(mask)} bytes of {mask.dtype} for {count} numbers")
    if scale.shape != (1,) or not bool(scale.isfinite().all()):
        raise ValueError("the scale is no finite number")
    bits = np.unpackbits(mask.numpy())
    kept = bits[:count].astype(bool)
    if bits[count:].any() or len(sign) != -(-int(kept.sum()) // 8):
        raise ValueError(f"there are {len(sign)} bytes of signs for {int(kept.sum())} numbers")
    signs = np.zeros(count, dtype=np.int8)
    signs[kept] = np.where(np.unpackbits(sign.numpy())[: kept.sum()] > 0, 1, -1)
    return Ternary(torch.from_numpy(signs).view(shape), float(scale))
