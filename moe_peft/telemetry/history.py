"""The routing of a whole run: load and gate mass of every expert at every logging step, in one safetensors file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .meter import Reading

FILE_NAME = "routing_history.safetensors"
NORM = "router_norm/"


class RoutingHistory:
    """Grows with every logging step of a run.

    The file holds "step" (S,) int64 and, for every place, "load/<place>/<adapter>" and "importance/<place>/<adapter>",
    both (S, E) float32 with rows that sum to one; NaN where a place was not measured at a step. "router_norm/..." is
    (E,) float64, the length of what the place's router knew of each expert when the run began.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows: dict[str, dict[int, torch.Tensor]] = {}
        self.initial_norms: dict[str, torch.Tensor] = {}

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to save: neither a step nor lengths from before the first one."""
        return not self.steps and not self.initial_norms

    def append(self, step: int, reading: Reading) -> None:
        """Add what was measured up to an optimizer step."""
        self.steps.append(step)
        for (place, adapter), statistics in reading.places.items():
            for kind, row in (("load", statistics.load), ("importance", statistics.importance)):
                self.rows.setdefault(f"{kind}/{place}/{adapter}", {})[step] = row.float()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The content of the file."""
        tensors = {"step": torch.tensor(self.steps, dtype=torch.long)}
        for name, rows in self.rows.items():
            missing = torch.full_like(next(iter(rows.values())), float("nan"))
            tensors[name] = torch.stack([rows.get(step, missing) for step in self.steps])
        return tensors | {f"{NORM}{place}": norms_E for place, norms_E in self.initial_norms.items()}

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the file, whole or not at all.

        Args:
            folder: Existing folder, such as a checkpoint's.

        Returns:
            Path of the file.
        """
        path = Path(folder) / FILE_NAME
        partial = path.with_suffix(".partial")
        save_file(self.tensors(), partial)
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> RoutingHistory:
        """Read the file of a folder.

        Raises:
            FileNotFoundError: The folder has none.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {FILE_NAME}; moe_peft.attach(trainer) writes it with checkpoints."
            )
        history = cls()
        with safe_open(path, framework="pt") as file:
            history.steps = file.get_tensor("step").tolist()
            for name in file.keys():  # noqa: SIM118, the file is no mapping
                if name.startswith(NORM):
                    history.initial_norms[name.removeprefix(NORM)] = file.get_tensor(name)
                elif name != "step":
                    rows = zip(history.steps, file.get_tensor(name), strict=True)
                    history.rows[name] = {step: row for step, row in rows if not row.isnan().all()}
        return history
