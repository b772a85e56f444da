"""Colors and places of marks follow the numbers."""

from __future__ import annotations

import math
import re

from moe_peft.tools.report.svg import (
    Grid,
    Line,
    cosine_scale,
    heat_map,
    line_chart,
    relative_scale,
    share_scale,
)


def test_scales_are_neutral_where_nothing_is_to_see():
    assert relative_scale(1.0) == cosine_scale(0.0) == share_scale(0.0) == 4
    assert [relative_scale(v) for v in (0.0, 0.25, 0.5, 2.0, 4.0, 99.0)] == [0, 0, 2, 6, 8, 8]
    assert [cosine_scale(v) for v in (-1.0, 1.0)] == [0, 8] and share_scale(1.0) == 8


def test_a_heat_map_has_a_cell_for_every_number_with_a_title():
    grid = Grid(["0", "1"], ["0", "1", "2"], [[1.0, 4.0, math.nan], [0.1, 1.0, 1.0]])
    drawn = heat_map(grid, relative_scale, "a & b")
    cells = re.findall(r'class="cell (\w+)"', drawn)
    assert cells == ["c4", "c8", "cn", "c0", "c4", "c4"]
    assert "layer 0, expert 2: not known" in drawn and 'aria-label="a &amp; b"' in drawn


def test_many_experts_get_narrow_cells_and_few_labels():
    grid = Grid(["0"], [str(n) for n in range(128)], [[1.0] * 128])
    drawn = heat_map(grid, relative_scale, "many")
    assert drawn.count("<rect") == 128 and 20 < drawn.count('text-anchor="middle"') < 70


def test_lines_leave_gaps_and_single_points_are_dots():
    line = Line("a", [0.0, math.nan, 1.0], [(0.0, 0.5), (math.nan, math.nan), (0.5, 1.0)])
    drawn = line_chart([0, 1, 2], [line], "lines", x_name="layer")
    assert drawn.count("<circle") == 2 and drawn.count("<polyline") == drawn.count("<polygon") == 1
    points = re.search(r'<polyline class="line s0" points="([^"]*)"', drawn).group(1).split()
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points)
    assert x0 < x1 and y1 < y0  # larger numbers stand higher
    alone = line_chart([3], [Line("a", [0.5])], "one", x_name="layer")
    assert alone.count("<circle") == 1 and "<polyline" not in alone
