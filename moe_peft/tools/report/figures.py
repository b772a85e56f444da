"""The figures of a report's page, each with its caption, a description and the table of its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import torch

from .groups import shares_by_group
from .measure import PlaceRouting
from .measures import known_mean, relative_entropy
from .report import RoutingReport
from .svg import STEPS, Grid, Line, cosine_scale, heat_map, line_chart, relative_scale, share_scale

MOST_ROWS = 400  # of a table


def importance_figures(report: RoutingReport) -> list[str]:
    """A heat map of the importance for each kind of place."""
    return [_by_kind(kind, own, "importance") for kind, own in of_kinds(report.places)]


def load_figures(report: RoutingReport) -> list[str]:
    """The same of the load, of places where a token does not use all experts."""
    chosen = [own for own in report.places if not own.dense and own.experts_per_token < own.num_experts - 1e-6]
    return [_by_kind(kind, own, "load") for kind, own in of_kinds(chosen)]


def of_kinds(places: Iterable[PlaceRouting]) -> list[tuple[str, list[PlaceRouting]]]:
    """Places by their name without the layer and by their number of experts, under the end of that name.

    Args:
        places: Any.
    """
    kinds: dict[tuple[str, str, int], list[PlaceRouting]] = {}
    for own in places:
        kinds.setdefault((own.kind, own.adapter, own.num_experts), []).append(own)
    adapters = {adapter for _, adapter, _ in kinds}
    return [
        (short(kind) + (f" ({adapter})" if len(adapters) > 1 else ""), own)
        for (kind, adapter, _), own in kinds.items()
    ]


def short(name: str) -> str:
    """What a place is called behind the index of its layer.

    Args:
        name: A kind of places, with "*" for the index.
    """
    return name.rpartition("*.")[2] or name


def _by_kind(kind: str, places: Sequence[PlaceRouting], what: str) -> str:
    shares = [getattr(own.total, what) for own in places]
    grid = Grid(
        rows=[_row(own) for own in places],
        columns=[str(expert) for expert in range(places[0].num_experts)],
        values=[(own.double() * len(own)).tolist() for own in shares],
        text=lambda value: f"{value / places[0].num_experts:.1%}, {value:.2f} of even",
    )
    peak = max(range(len(places)), key=lambda row: max(grid.values[row]))
    expert = max(range(places[0].num_experts), key=lambda column: grid.values[peak][column])
    top = f"largest: expert {expert} of layer {grid.rows[peak]}, {float(shares[peak][expert]):.1%}"
    described = f"Heat map of the {what} of {places[0].num_experts} experts at {kind} in {len(places)} layers; {top}."
    return _figure(kind, top, heat_map(grid, relative_scale, described), grid)


def _row(place: PlaceRouting) -> str:
    return "-" if place.layer is None else str(place.layer)


def entropy_figure(report: RoutingReport) -> list[str]:
    """Evenness of the load, and a token's own entropy, by layer."""
    layers = sorted({own.layer for own in report.places if own.layer is not None})
    x = layers or list(range(len(report.places)))
    at = [[p for p in report.places if p.layer == layer] for layer in layers] or [[own] for own in report.places]
    even = [[relative_entropy(own.total.importance) for own in group] for group in at]
    own = [[place.token_entropy for place in group] for group in at]
    lines = [
        Line("evenness of the experts", [known_mean(v) for v in even], [(min(v), max(v)) for v in even]),
        Line("a token's own entropy", [known_mean(v) for v in own], [(min(v), max(v)) for v in own]),
    ]
    name = "layer" if layers else "place"
    described = (
        f"Lines over {len(x)} {name}s: evenness {known_mean(lines[0].values):.2f}, a token's entropy "
        f"{known_mean(lines[1].values):.2f} in the mean."
    )
    caption = "1 is even. Bands span the places of a layer."
    chart = line_chart(x, lines, described, x_name=name)
    return [_figure("Entropy", caption, chart, _table_of(x, lines, name), key=lines)]


def group_figures(report: RoutingReport) -> list[str]:
    """How far apart the groups are, by pair and by layer, and who serves whom where they differ most."""
    apart = report.divergences()
    if not apart:
        return []
    matrix = report.divergence_matrix()
    grid = Grid(report.groups, report.groups, matrix, "group", "group")
    described = (
        f"Heat map of the divergence of {len(report.groups)} groups by pair, mean {known_mean(apart.values()):.3f}."
    )
    figures = [
        _figure("Divergence of each pair", "Mean over the places.", heat_map(grid, share_scale, described), grid)
    ]
    widest = max(report.places, key=lambda own: apart.get(own.place, -1.0))
    shares_GE = shares_by_group(widest, report.groups).double() * widest.num_experts
    named = [group for group in report.groups if widest.statistics(group) is not None]
    columns = [str(expert) for expert in range(widest.num_experts)]
    chosen = Grid(named, columns, shares_GE.tolist(), "group", "expert", "{:.2f} of even".format)
    where = f"{widest.place}, where the groups differ most ({apart[widest.place]:.3f})."
    described = f"Heat map of the importance of {widest.num_experts} experts in {len(named)} groups at {where}"
    figures.append(_figure("Who serves whom", where, heat_map(chosen, relative_scale, described), chosen))
    layers = sorted({own.layer for own in report.places if own.layer is not None and own.place in apart})
    if len(layers) > 1:
        at = [[apart[p.place] for p in report.places if p.layer == layer and p.place in apart] for layer in layers]
        line = Line("divergence", [known_mean(v) for v in at], [(min(v), max(v)) for v in at])
        top = _nice(max(max(v) for v in at))
        chart = line_chart(
            layers, [line], f"Divergence of the groups over {len(layers)} layers.", x_name="layer", top=top
        )
        table = _table_of(layers, [line], "layer")
        figures.append(_figure("Divergence by layer", "Bands span the places of a layer.", chart, table))
    return figures


def history_figures(report: RoutingReport) -> list[str]:
    """Evenness and movement over the steps of the training run."""
    own = report.curves
    if own is None:
        return []
    x = own.steps
    even = Line("evenness", [mean for mean, _, _ in own.entropy], [(low, high) for _, low, high in own.entropy])
    described = f"Evenness of the experts over {len(x)} readings, from {even.values[0]:.2f} to {even.values[-1]:.2f}."
    figures = [
        _figure(
            "Evenness of the experts",
            "Entropy of the importance over log E; the band spans the places.",
            line_chart(x, [even], described, x_name="step"),
            _table_of(x, [even], "step"),
        )
    ]
    if len(x) > 1:
        moved = Line("moved", [math.nan, *own.moved[1:]])
        top = _nice(max(own.moved[1:]))
        described = f"Gate mass that went to other experts between readings, last {own.moved[-1]:.3f}."
        chart = line_chart(x, [moved], described, x_name="step", top=top)
        caption = "Share of the gate mass that went to other experts since the reading before."
        figures.append(_figure("Movement", caption, chart, _table_of(x, [moved], "step")))
    return figures


def similarity_figures(report: RoutingReport) -> list[str]:
    """Mean cosine of the pairs of experts, for each kind of place."""
    figures = []
    for kind, own in of_kinds(report.places):
        known = [report.similarity[p.place] for p in own if p.place in report.similarity]
        if not known or any(len(matrix) != len(known[0]) for matrix in known):
            continue
        mean = torch.stack(known).nanmean(0)
        if mean.isnan().all():
            continue
        names = [str(expert) for expert in range(len(mean))]
        grid = Grid(names, names, mean.tolist(), "expert", "expert")
        pairs = mean[torch.ones_like(mean, dtype=torch.bool).triu(1)]
        top = f"mean of the pairs {float(pairs.nanmean()):.2f}, over {len(known)} layers"
        described = f"Heat map of the cosines of {len(mean)} experts at {kind}; {top}."
        figures.append(_figure(kind, top, heat_map(grid, cosine_scale, described), grid))
    return figures


def relative_legend() -> str:
    """What the colors of shares mean."""
    swatches = "".join(f'<i class="c{number}"></i>' for number in range(STEPS))
    return (
        '<div class="legend"><span>a quarter of even, or less</span>'
        f'<span class="swatches">{swatches}</span><span>four times even, or more</span></div>'
    )


def _figure(title: str, caption: str, svg: str, numbers: Grid, *, key: Sequence[Line] = ()) -> str:
    keys = "".join(f'<span class="key"><i class="s{n}"></i>{escape(own.name)}</span>' for n, own in enumerate(key))
    legend = f'<div class="legend">{keys}</div>' if key else ""
    return (
        f"<figure><h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>"
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(title)}">{svg}</div>{legend}'
        f"<details><summary>Numbers</summary><div class='scroll'>{_table(numbers)}</div></details></figure>"
    )


def _table(grid: Grid) -> str:
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in grid.columns)
    rows = [
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{_number(value)}</td>' for value in values)}</tr>"
        for name, values in zip(grid.rows, grid.values, strict=True)
    ]
    corner = escape(f"{grid.row_name} / {grid.column_name}" if grid.column_name else grid.row_name)
    return f"<table><thead><tr><th>{corner}</th>{head}</tr></thead><tbody>{''.join(rows[:MOST_ROWS])}</tbody></table>"


def _table_of(x: Sequence[float], lines: Sequence[Line], name: str) -> Grid:
    values = [[line.values[row] for line in lines] for row in range(len(x))]
    return Grid([f"{number:g}" for number in x], [line.name for line in lines], values, name, "")


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def _nice(largest: float) -> float:
    """The end of an axis: the next of 1, 2, 5 times a power of ten, and one at most."""
    if not largest > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return min(1.0, next(step * power for step in (1, 2, 5, 10) if step * power >= largest))
