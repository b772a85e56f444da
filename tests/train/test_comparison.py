"""Means, intervals and differences over seeds are those of the definition, and the table shows them."""

from __future__ import annotations

import json
import math
import re

import pytest
from comparison import METRICS, curves_of, last_of, markdown, mean_and_interval, plot, table_of, without_nan
from rates import FACTORS

from tests.docs.pages import DOCS, ROOT


def made(held_out, memory=2_000_000):
    curves = {"loss": [[1, 9.0], [2, 5.0]], "eval_loss": [[0, 9.0], [2, held_out]]}
    return {"seed": 0, "parameters": 1234, "steps": 2, "seconds": 3.0, "memory": memory, "curves": curves}


def test_the_interval_is_students():
    assert mean_and_interval([2.0]) == (2.0, None)
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))
    many = [0.0, 1.0] * 50
    assert mean_and_interval(many)[1] == pytest.approx(1.96 * 0.502519 / 10, rel=1e-4)


def test_differences_to_the_first_method_are_paired_by_seed():
    rows = table_of({"a": [made(1.0), made(3.0)], "b": [made(1.5), made(3.5)]}, "sft")
    assert rows[0]["eval_loss - a's"] is None
    assert rows[1]["eval_loss - a's"] == (0.5, 0.0) and rows[1]["eval_loss"][1] > 10
    assert rows[0]["s per step"] == (1.5, 0.0) and rows[0]["peak MB"] == (2.0, 0.0)


def test_what_was_not_measured_is_a_dash_in_a_table_whose_columns_line_up():
    rows = table_of({"a": [made(1.0, None)], "longer": [made(2.0)]}, "sft")
    lines = markdown(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
    assert "|      - |" in lines[2].replace("-  ", "- ") or lines[2].rstrip(" |").endswith("-")
    assert "1,234" in lines[3]


def test_the_end_of_a_curve_and_the_steps_that_all_seeds_have():
    assert last_of([], 0.5) is None and last_of([[1, 4.0], [2, 2.0]], 0.0) == 2.0
    assert last_of([[n, float(n)] for n in range(10)], 0.2) == 8.5
    runs = [{"curves": {"loss": [[1, 5.0], [2, 4.0]]}}, {"curves": {"loss": [[2, 6.0]]}}]
    assert curves_of(runs, "loss") == ([2], [[4.0, 6.0]])


def test_every_script_has_its_curves_and_they_are_drawn(tmp_path):
    assert METRICS.keys() == FACTORS.keys()
    pytest.importorskip("matplotlib")
    plot({"a": [made(1.0), made(3.0)], "b": [made(1.5)]}, "sft", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_that_diverged_is_told_in_its_row_alone_and_stays_json(value):
    rows = table_of({"a": [made(1.0), made(3.0)], "b": [made(1.5), made(value)]}, "sft")
    lines = markdown(rows).splitlines()
    assert "diverged" not in lines[2] and lines[3].count("diverged") == 2
    json.loads(json.dumps(without_nan(rows), allow_nan=False))
    assert without_nan({"x": (value, 1.0)}) == {"x": [None, 1.0]}


def test_the_table_of_the_page_is_that_of_the_recorded_runs():
    page = (DOCS / "compare.md").read_text()
    found = re.findall(r"<!-- compare: (\S+) -->\n\n(.*?)\n\n<!-- end of compare -->", page, re.DOTALL)
    assert found
    for name, block in found:
        recorded = json.loads((ROOT / name).read_text())
        assert markdown(table_of(recorded["runs"], recorded["script"])) == block
