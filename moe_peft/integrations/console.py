"""What a trainer prints: its own entries in a line, and the routing as a table every so many steps.

Trackers and the log history get every entry; only what is printed is put in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from ..tables import table

PREFIX = "moe/"
# Statistics in the order of the columns, and their headings.
COLUMNS = {
    "load_entropy": "entropy",
    "max_over_mean_load": "max/mean",
    "dead_experts": "dead",
    "confidence": "confidence",
    "drop_rate": "dropped",
}


class ShortLog:
    """Stands in for the `on_log` of a callback that prints.

    Args:
        callback: The callback.
        steps: Optimizer steps between two tables, at least; 0 prints none.
    """

    def __init__(self, callback: Any, steps: int) -> None:
        self.on_log = callback.on_log
        self.steps = steps
        self.last: int | None = None

    def __call__(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the entries that are not of the routing, and the table where it is due; arguments as of a callback."""
        logs = logs or {}
        own = {name: value for name, value in logs.items() if name.startswith(PREFIX)}
        rest = {name: value for name, value in logs.items() if name not in own}
        self.on_log(args, state, control, logs=rest, **kwargs)
        if own and state.is_world_process_zero and self._is_due(state.global_step):
            self.last = state.global_step
            tqdm.write(routing_table(own, state.global_step))

    def _is_due(self, step: int) -> bool:
        # A step before the last one is that of a new run.
        return self.steps > 0 and (self.last is None or not 0 <= step - self.last < self.steps)


def print_tables(trainer: Any, steps: int) -> None:
    """Let a trainer print tables of the routing in place of its entries.

    Args:
        trainer: A trainer of transformers or TRL; a second call changes the number of steps alone.
        steps: Optimizer steps between two tables, at least; 0 prints none.
    """
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, (PrinterCallback, ProgressCallback)):
            continue
        if isinstance(callback.on_log, ShortLog):
            callback.on_log.steps = steps
        else:
            callback.on_log = ShortLog(callback, steps)  # type: ignore[method-assign]


def routing_table(entries: Mapping[str, float], step: int) -> str:
    """Entries of a log as a table: a line for all places, and one for each group of layers.

    Args:
        entries: "moe/<loss>", "moe/<statistic>" and "moe/<layers>/<statistic>".
        step: Optimizer step.

    Returns:
        Lines; the losses stand behind the step in the first.
    """
    rows: dict[str, dict[str, float]] = {}
    losses: dict[str, float] = {}
    for name, value in entries.items():
        label, _, what = name.removeprefix(PREFIX).rpartition("/")
        if what in COLUMNS:
            rows.setdefault(label or "all places", {})[what] = value
        else:
            losses[f"{label}/{what}" if label else what] = value
    known = [what for what in COLUMNS if any(what in row for row in rows.values())]
    head = ", ".join([f"routing at step {step}", *(f"{name} {value:.4g}" for name, value in losses.items())])
    if not known:
        return head
    cells = [["", *(COLUMNS[what] for what in known)]]
    for label, row in rows.items():
        cells.append([label.replace("_", " "), *(f"{row[what]:.3f}" if what in row else "-" for what in known)])
    return f"{head}\n{table(cells, indent=2)}"
