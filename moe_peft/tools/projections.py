"""An expert's projections as files of others keep them, one (out, in) matrix each, of a backbone's fused matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def projections_of(
    experts: nn.Module, matrix: str, rows: torch.Tensor, names: Sequence[str] = PROJECTIONS
) -> list[tuple[str, torch.Tensor]]:
    """What one expert's fused matrix stands for.

    Args:
        experts: The backbone's experts module, whose flags say how gate and up are joined.
        matrix: "gate_up" or "down".
        rows: (out, ...) of the matrix, or of the up matrix of its low-rank pair.
        names: Of the gate, up and down projection.

    Returns:
        Name of a projection, and its rows.
    """
    gate, up, down = names
    if matrix == "down":
        return [(down, rows)]
    if not getattr(experts, "has_gate", True):
        return [(up, rows)]
    if getattr(experts, "is_concatenated", True):
        first, second = rows.chunk(2)
        return [(gate, first), (up, second)]
    return [(gate, rows[::2]), (up, rows[1::2])]


def joined(
    experts: nn.Module, matrix: str, projections: Mapping[str, torch.Tensor], names: Sequence[str] = PROJECTIONS
) -> torch.Tensor:
    """One expert's fused matrix of its projections, the inverse of `projections_of`.

    Args:
        experts: The backbone's experts module.
        matrix: "gate_up" or "down".
        projections: Name of a projection -> its rows.
        names: Of the gate, up and down projection.
    """
    gate, up, down = names
    if matrix == "down":
        return projections[down]
    if not getattr(experts, "has_gate", True):
        return projections[up]
    if getattr(experts, "is_concatenated", True):
        return torch.cat([projections[gate], projections[up]])
    return torch.stack([projections[gate], projections[up]], dim=1).flatten(0, 1)
