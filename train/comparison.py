"""What a comparison says: means with intervals over seeds, differences to the first method, a table and a plot.

The interval is Student's at 95%: mean +- t(n - 1) s / sqrt(n), with s the standard deviation over the n seeds. Seeds
are paired, so that the interval of a difference to the first method is that of the differences seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_peft.tables import aligned

# Script -> the curve in training, and the held-out one; of reinforcement learning the rewards.
METRICS = dict.fromkeys(("sft", "dpo", "kto", "reward"), ("loss", "eval_loss"))
METRICS |= dict.fromkeys(("grpo", "rloo"), ("reward", "eval_reward"))
# Share of a curve in training that its last value is the mean of.
LAST = 0.2
# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom, and the normal distribution's beyond.
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
NORMAL = 1.960
COLORS = ["#1f5fa8", "#d1603d", "#3f8f5b", "#8a5fb0", "#a58a2a", "#4a4f57"]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% interval; None of a single value, and where a run diverged.

    Args:
        values: One of each seed; NaN or infinite where it diverged.
    """
    if not all(map(math.isfinite, values)):
        return math.nan, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    freedom = len(values) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def last_of(curve: Sequence[Sequence[float]], share: float = LAST) -> float | None:
    """The mean of the end of a curve.

    Args:
        curve: [step, value] in the order of steps.
        share: Of its values, one at least.
    """
    if not curve:
        return None
    count = max(1, round(share * len(curve)))
    # Summed without an error for infinities of both signs, unlike statistics.fmean.
    return sum(value for _, value in curve[-count:]) / count


def table_of(results: dict[str, list[dict[str, Any]]], script: str) -> list[dict[str, Any]]:
    """One row for each method.

    Args:
        results: Method -> what each of its runs measured, in one order of seeds.
        script: "sft", "dpo", ...

    Returns:
        Column -> a number, or (mean, half the width of its interval or None), or None where nothing was measured.
    """
    metric, held_out = METRICS[script]
    first = next(iter(results))
    rows = []
    for name, runs in results.items():
        last = [last_of(run["curves"].get(held_out, []), 0.0) for run in runs]
        reference = [last_of(run["curves"].get(held_out, []), 0.0) for run in results[first]]
        minus = [a - b for a, b in zip(last, reference, strict=True) if a is not None and b is not None]
        rows.append(
            {
                "method": name,
                "trained parameters": runs[0]["parameters"],
                metric: _over_seeds([last_of(run["curves"].get(metric, [])) for run in runs]),
                held_out: _over_seeds(last),
                f"{held_out} - {first}'s": None if name == first else _over_seeds(minus),
                "s per step": _over_seeds([run["seconds"] / run["steps"] for run in runs]),
                "peak MB": _over_seeds([None if run["memory"] is None else run["memory"] / 1e6 for run in runs]),
            }
        )
    return rows


def _over_seeds(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    known = [value for value in values if value is not None]
    return mean_and_interval(known) if known and len(known) == len(values) else None


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, aligned so that it reads as text too.

    Args:
        rows: What `table_of` returned.
    """
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    lines = aligned(cells)
    widths = [len(cell) for cell in lines[0]]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (tuple, list)):
        mean, half = value
        if not math.isfinite(mean):
            return "diverged"
        return f"{mean:.4g}" if half is None else f"{mean:.4g} +- {half:.2g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def without_nan(value: Any) -> Any:
    """Values as JSON holds them, which has no NaN and no infinity: None in their place.

    Args:
        value: A number, a text, or dicts, lists and tuples of them.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(own) for key, own in value.items()}
    return [without_nan(own) for own in value] if isinstance(value, (list, tuple)) else value


def plot(results: dict[str, list[dict[str, Any]]], script: str, path: Path) -> None:
    """Draw the curves of training and of held-out data: the mean over seeds, and a band from the least to the most.

    Args:
        results: Method -> what each of its runs measured.
        script: "sft", "dpo", ...
        path: File to write; its ending says the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), METRICS[script], strict=True):
        for index, (name, runs) in enumerate(results.items()):
            steps, rows = curves_of(runs, metric)
            color = COLORS[index % len(COLORS)]
            axes.plot(steps, [sum(row) / len(row) for row in rows], color=color, label=name, marker=".")
            axes.fill_between(steps, [min(row) for row in rows], [max(row) for row in rows], color=color, alpha=0.15)
        axes.set_xlabel("step")
        axes.set_title(metric)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def curves_of(runs: Sequence[dict[str, Any]], metric: str) -> tuple[list[float], list[list[float]]]:
    """The steps at which all seeds have a value, and the values of all seeds there.

    Args:
        runs: Of one method.
        metric: Name of the curve.
    """
    by_seed = [dict(run["curves"].get(metric, [])) for run in runs]
    steps = sorted(set.intersection(*map(set, by_seed)))
    return steps, [[own[step] for own in by_seed] for step in steps]
