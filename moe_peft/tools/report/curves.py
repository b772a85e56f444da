"""How the routing changed over a training run, from the history that is saved beside an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...telemetry.history import FILE_NAME, RoutingHistory
from .measures import relative_entropy


@dataclass(frozen=True)
class Curves:
    """Numbers by logging step, over all places.

    Attributes:
        steps: Optimizer steps.
        entropy: Mean, smallest and largest over the places of the entropy of the shares of the gate mass over log E.
        busiest: Mean over the places of the largest share of the gate mass over the even share.
        moved: Mean over the places of the part of the gate mass that went to other experts since the step before; zero
            at the first.
    """

    steps: list[int]
    entropy: list[tuple[float, float, float]]
    busiest: list[float]
    moved: list[float]


def read_curves(folder: str | Path) -> Curves | None:
    """Read the history of a run.

    Args:
        folder: Of an adapter or a checkpoint.

    Returns:
        None where the folder has none.
    """
    if not (Path(folder) / FILE_NAME).is_file():
        return None
    history = RoutingHistory.load(folder)
    rows = {name: own for name, own in history.tensors().items() if name.startswith("importance/")}
    return curves(history.steps, list(rows.values())) if rows and history.steps else None


def curves(steps: Sequence[int], shares: Sequence[torch.Tensor]) -> Curves:
    """Sum up the shares of all places.

    Args:
        steps: S optimizer steps.
        shares: Of each place, (S, E) shares of the gate mass; NaN where it was not measured at a step.
    """
    entropy, busiest, moved = [], [], []
    for number in range(len(steps)):
        present = [own[number].double() for own in shares if not own[number].isnan().any()]
        values = [relative_entropy(own) for own in present] or [float("nan")]
        entropy.append((sum(values) / len(values), min(values), max(values)))
        peaks = [float(own.max()) * len(own) for own in present] or [float("nan")]
        busiest.append(sum(peaks) / len(peaks))
        pairs = [own[number - 1 : number + 1].double() for own in shares] if number else []
        moves = [float((two[1] - two[0]).abs().sum()) / 2 for two in pairs if not two.isnan().any()]
        moved.append(sum(moves) / len(moves) if moves else 0.0)
    return Curves(list(steps), entropy, busiest, moved)
