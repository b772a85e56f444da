"""Tables and a plot of selected experts: layers by experts, and how much the selections of several tasks overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from types import NoneType
from typing import Any

from ..messages import shown
from ..tables import table
from .scores import ExpertScores
from .select import select_experts
from .selected import ExpertSelection

SELECTED, OTHER = "#1f5fa8", "#e9edf2"


def selection_table(selection: ExpertSelection, scores: ExpertScores | None = None) -> str:
    """One line per layer, then the totals.

    Args:
        selection: Selected experts.
        scores: The scores they were selected by. They add the score that the experts of a layer reach together and,
            for the gate criterion, how many experts the same p selects by raw scores and by scores normalized to sum
            to one, as the two differ from backbone to backbone.

    Returns:
        Text.

    Raises:
        ValueError: The arguments are of other types, or the scores do not hold the layers of the selection.
    """
    if not isinstance(selection, ExpertSelection) or not isinstance(scores, (ExpertScores, NoneType)):
        raise ValueError(
            f"selection={shown(selection)} and scores={shown(scores)} must be an ExpertSelection, and ExpertScores or "
            "None."
        )
    header, columns = ["layer", "selected"], [list(selection.experts), _counts(selection)]
    if scores is not None and selection.rule is not None:
        rule = selection.rule
        header.append("score")
        columns.append(
            [
                f"{float(scores.of(int(layer), rule.criterion, rule.aggregate)[ids].sum()):.3f}"
                for layer, ids in selection.experts.items()
            ]
        )
        if rule.criterion == "gate":
            for name, normalize in (("raw", False), ("normalized", True)):
                made = select_experts(scores, **{**asdict(rule), "normalize_scores": normalize})
                header.append(name)
                columns.append([str(made.counts[layer]) for layer in selection.experts])
    columns.append([" ".join(map(str, own)) for own in selection.experts.values()])
    rows = [(*header, "experts"), *zip(*columns, strict=True)]
    return f"{table(rows, '>' * len(header) + '<')}\n{_total(selection)}"


def overlap_table(selections: Mapping[str, ExpertSelection]) -> str:
    """Number of selected experts by layer and task, and the Jaccard index of each pair of tasks.

    Args:
        selections: Name of a task -> its selection, of one backbone.

    Returns:
        Text; one line per layer, then the totals and means.

    Raises:
        ValueError: The selections have no names.
    """
    _check_named(selections)
    layers = _layers(selections.values())
    pairs = list(combinations(selections, 2))
    overlaps = {pair: selections[pair[0]].overlap(selections[pair[1]]) for pair in pairs}
    header = ["layer", *selections, *(f"{first} & {second}" for first, second in pairs)]
    columns = [[*layers, "all"]]
    for selection in selections.values():
        columns.append([*(str(selection.counts.get(layer, 0)) for layer in layers), str(selection.num_selected)])
    for overlap in overlaps.values():
        values = [overlap.get(layer, 1.0) for layer in layers]
        columns.append([f"{value:.2f}" for value in (*values, sum(values) / max(len(values), 1))])
    return table([header, *zip(*columns, strict=True)], ">")


def plot_selection(selections: Mapping[str, ExpertSelection], path: str | Path) -> None:
    """Draw which experts each task selects, a panel per task, and how much the tasks overlap.

    Args:
        selections: Name of a task -> its selection, of one backbone.
        path: Image file to write; its ending chooses the format.

    Raises:
        ValueError: There is nothing to draw, or the selections have no names.
        ImportError: matplotlib is not installed.
    """
    _check_named(selections)
    if not any(selection.experts for selection in selections.values()):
        raise ValueError(
            f"selections={shown(selections)} has no layer to draw. Give at least one selection with layers."
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_selection needs matplotlib: pip install matplotlib") from error

    layers = _layers(selections.values())
    width = _num_experts(selections.values())
    panels = len(selections) + (len(selections) > 1)
    columns = min(panels, 3 if width <= 32 else 2)
    rows = math.ceil(panels / columns)
    panel = (min(max(0.22 * width, 3.2), 7.2) + 0.8, min(max(0.22 * len(layers), 1.6), 4.2) + 1.1)
    figure = Figure(figsize=(columns * panel[0], rows * panel[1]), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (task, selection) in zip(axes, selections.items(), strict=False):
        _draw_task(axis, task, selection, layers, width)
    if len(selections) > 1:
        _draw_overlap(axes[len(selections)], selections)
    for axis in axes[panels:]:
        axis.set_axis_off()
    figure.savefig(path, dpi=150)


def _check_named(selections: Any) -> None:
    named = isinstance(selections, Mapping) and all(isinstance(task, str) for task in selections)
    if not named or not all(isinstance(own, ExpertSelection) for own in selections.values()):
        raise ValueError(
            f"selections={shown(selections)} must be a dict from the name of a task to its selection: write "
            "{'my task': selection}."
        )


def _draw_task(axis: Any, task: str, selection: ExpertSelection, layers: Sequence[str], width: int) -> None:
    from matplotlib.colors import ListedColormap

    cells = [[int(expert in selection.experts.get(layer, ())) for expert in range(width)] for layer in layers]
    axis.pcolormesh(cells, cmap=ListedColormap([OTHER, SELECTED]), vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    axis.invert_yaxis()
    share = "" if selection.share is None else f" ({selection.share:.1%})"
    axis.set_title(f"{task}: {selection.num_selected} experts{share}", fontsize=10)
    axis.set_xlabel("expert", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)
    every_expert, every_layer = math.ceil(width / 16), math.ceil(len(layers) / 14)
    axis.set_xticks([expert + 0.5 for expert in range(0, width, every_expert)], range(0, width, every_expert))
    axis.set_yticks([row + 0.5 for row in range(0, len(layers), every_layer)], layers[::every_layer])
    axis.tick_params(length=0, labelsize=8)
    for side in axis.spines.values():
        side.set_visible(False)


def _draw_overlap(axis: Any, selections: Mapping[str, ExpertSelection]) -> None:
    tasks = list(selections)
    cells = [[_mean_overlap(selections[row], selections[column]) for column in tasks] for row in tasks]
    axis.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, own in enumerate(cells):
        for column, value in enumerate(own):
            color = "white" if value > 0.6 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)
    axis.set_title("overlap (Jaccard, mean over layers)", fontsize=10)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30 if max(map(len, tasks)) > 6 else 0)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.tick_params(length=0, labelsize=8)


def _mean_overlap(first: ExpertSelection, second: ExpertSelection) -> float:
    values = first.overlap(second).values()
    return sum(values) / max(len(values), 1)


def _layers(selections: Any) -> list[str]:
    return sorted({layer for selection in selections for layer in selection.experts}, key=int)


def _num_experts(selections: Any) -> int:
    """E, or one more than the highest selected expert where it is unknown."""
    known = [count for selection in selections for count in selection.num_experts.values()]
    seen = [expert + 1 for selection in selections for ids in selection.experts.values() for expert in ids]
    return max([*known, *seen, 1])


def _counts(selection: ExpertSelection) -> list[str]:
    known = selection.num_experts
    return [f"{count} / {known[layer]}" if layer in known else str(count) for layer, count in selection.counts.items()]


def _total(selection: ExpertSelection) -> str:
    share = f" of {sum(selection.num_experts.values())} ({selection.share:.1%})" if selection.share is not None else ""
    parts = [f"{selection.num_selected}{share} experts in {len(selection.experts)} layers"]
    if selection.num_parameters is not None:
        whole = selection.model_parameters
        part = f" ({selection.num_parameters / whole:.1%} of the model's {whole:,})" if whole else ""
        parts.append(f"{selection.num_parameters:,} parameters{part}")
    if selection.rule is not None:
        parts.append(str(selection.rule))
    return "; ".join(parts)
