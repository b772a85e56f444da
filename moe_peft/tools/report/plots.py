"""The figures of a report as PNG files, for papers and model cards; matplotlib is imported where one is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...telemetry.history import FILE_NAME, RoutingHistory
from .figures import of_kinds
from .measure import PlaceRouting
from .measures import relative_entropy
from .report import RoutingReport
from .style import LIGHT

MOST_PANELS = 12
ROUTING = "routing.png"


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(report: RoutingReport, folder: str | Path) -> list[Path]:
    """Draw the figures that a report has numbers for.

    Args:
        report: What was measured.
        folder: Existing folder.

    Returns:
        Paths of the files: importance.png, load.png, entropy.png, groups.png, history.png, similarity.png.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not has_matplotlib():
        raise ImportError("Plots need matplotlib: pip install matplotlib")
    made = {
        "importance": draw_shares(report.places, "importance"),
        "load": draw_shares([own for own in report.places if not own.dense], "load"),
        "entropy": _entropy(report),
        "groups": _groups(report),
        "history": _history(report),
        "similarity": _similarity(report),
    }
    paths = []
    for name, figure in made.items():
        if figure is not None:
            paths.append(Path(folder) / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def draw_history(folder: str | Path) -> Path | None:
    """Draw the importance at the end of a training run, from the history that it has left.

    Args:
        folder: Folder of an adapter; routing.png is written into it.

    Returns:
        The file; None where there is no history, or no matplotlib.
    """
    folder = Path(folder)
    if not (folder / FILE_NAME).is_file() or not has_matplotlib():
        return None
    places = []
    for name, rows in RoutingHistory.load(folder).rows.items():
        kind, _, place = name.partition("/")
        if kind == "importance" and rows:
            share_E, one = rows[max(rows)].double(), torch.ones(())
            module, _, adapter = place.rpartition("/")
            own = PlaceRouting(module, adapter, len(share_E))
            own.sums["", 0] = [share_E, share_E, one, one]
            places.append(own)
    figure = draw_shares(places, "importance")
    if figure is None:
        return None
    figure.savefig(folder / ROUTING, dpi=120)
    return folder / ROUTING


def draw_shares(places: Sequence[PlaceRouting], what: str) -> Any:
    """A panel of layers by experts for each kind of place.

    Args:
        places: What was measured.
        what: "importance" or "load".

    Returns:
        A figure of matplotlib; None where there is nothing to draw.
    """
    panels = []
    for kind, own in of_kinds(places)[:MOST_PANELS]:
        values = [(getattr(p.total, what).double() * p.num_experts).clamp(0.25, 4).log2().tolist() for p in own]
        panels.append((kind, values, ["-" if p.layer is None else str(p.layer) for p in own]))
    return _panels(panels, f"{what} over the even share", (-2, 2), ["1/4", "1/2", "even", "2", "4"])


def _panels(
    panels: Sequence[tuple[str, list[list[float]], list[str]]],
    label: str,
    limits: tuple[float, float],
    ticks: Sequence[str],
    names: tuple[str, str] = ("expert", "layer"),
) -> Any:
    if not panels:
        return None
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    tallest = max(len(values) for _, values, _ in panels)
    size = (3.4 * columns + 0.9, rows * (1.1 + min(max(0.2 * tallest, 1.2), 4.0)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    colors = LinearSegmentedColormap.from_list("even", LIGHT)
    for axis, (title, values, labels) in zip(axes, panels, strict=False):
        image = axis.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="none")
        every = math.ceil(len(labels) / 12)
        axis.set_yticks(range(0, len(labels), every), labels[::every])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(names[0], fontsize=8)
        axis.set_ylabel(names[1], fontsize=8)
        axis.tick_params(length=0, labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for side in axis.spines.values():
            side.set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    bar = figure.colorbar(image, ax=axes.tolist(), fraction=0.03, pad=0.02, label=label)
    span = limits[1] - limits[0]
    bar.set_ticks([limits[0] + span * n / (len(ticks) - 1) for n in range(len(ticks))], labels=ticks)
    bar.outline.set_visible(False)
    return figure


def _lines(x: Sequence[float], lines: dict[str, Sequence[float]], x_name: str, y_name: str, top: float | None) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axis = figure.subplots()
    for (name, values), style in zip(lines.items(), ("o-", "s--", "^:"), strict=False):
        axis.plot(x, values, style, label=name, markersize=3.5, linewidth=1.6)
    axis.set_ylim(0, top)
    axis.set_xlabel(x_name, fontsize=9)
    axis.set_ylabel(y_name, fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if len(lines) > 1:
        axis.legend(fontsize=8, frameon=False)
    return figure


def _entropy(report: RoutingReport) -> Any:
    layers = sorted({own.layer for own in report.places if own.layer is not None})
    if not layers:
        return None
    at = [[own for own in report.places if own.layer == layer] for layer in layers]
    even = [sum(relative_entropy(own.total.importance) for own in group) / len(group) for group in at]
    own = [sum(place.token_entropy for place in group) / len(group) for group in at]
    lines: dict[str, Sequence[float]] = {"evenness of the experts": even, "a token's own entropy": own}
    return _lines(layers, lines, "layer", "over log E", 1.05)


def _groups(report: RoutingReport) -> Any:
    if not report.divergences():
        return None
    ticks = ["0", "0.25", "0.5", "0.75", "1"]
    panel = ("divergence of the groups", report.divergence_matrix(), list(report.groups))
    figure = _panels([panel], "Jensen-Shannon, over its maximum", (0, 1), ticks, ("group", "group"))
    figure.axes[0].set_xticks(range(len(report.groups)), report.groups, rotation=30, ha="right")
    return figure


def _history(report: RoutingReport) -> Any:
    own = report.curves
    if own is None:
        return None
    return _lines(
        own.steps, {"evenness": [mean for mean, _, _ in own.entropy]}, "step", "evenness of the experts", 1.05
    )


def _similarity(report: RoutingReport) -> Any:
    panels = []
    for kind, own in of_kinds(report.places):
        known = [report.similarity[p.place] for p in own if p.place in report.similarity]
        if known and all(len(matrix) == len(known[0]) for matrix in known):
            mean = torch.stack(known).nanmean(0)
            if not mean.isnan().all():
                panels.append((kind, mean.tolist(), [str(expert) for expert in range(len(mean))]))
    ticks = ["-1", "-0.5", "0", "0.5", "1"]
    return _panels(panels[:MOST_PANELS], "cosine of what they add", (-1, 1), ticks, ("expert", "expert"))
