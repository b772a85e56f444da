"""The tables hold the numbers of the selections, and the plot colours exactly the selected cells."""

from __future__ import annotations

import sys

import pytest
import torch

from moe_peft import ExpertScores, ExpertSelection, overlap_table, plot_selection, select_experts, selection_table
from moe_peft.selection.scores import LayerScores

FIRST = ExpertSelection({"2": [1, 2], "10": [3]}, num_experts={"2": 4, "10": 4})
SECOND = ExpertSelection({"2": [2, 3], "10": [3]}, num_experts={"2": 4, "10": 4})


def gate_scores():
    layers = {3: [0.05, 0.04, 0.03, 0.08], 10: [0.1, 0.2, 0.3, 0.4]}
    return ExpertScores(
        {
            layer: LayerScores({("gate", "token"): torch.tensor(row, dtype=torch.float64)}, 2, 30)
            for layer, row in layers.items()
        },
        model_parameters=600,
    )


def test_the_table_shows_every_layer_and_both_counts_of_the_gate_criterion():
    scores = gate_scores()
    assert selection_table(select_experts(scores, 0.1, criterion="gate"), scores).splitlines() == [
        "layer  selected  score  raw  normalized  experts",
        "    3     2 / 4  0.130    2           1  3 0",
        "   10     1 / 4  0.400    1           1  3",
        "3 of 8 (37.5%) experts in 2 layers; 90 parameters (15.0% of the model's 600); gate scores, p=0.1",
    ]
    normalized = select_experts(scores, 0.1, criterion="gate", normalize_scores=True, min_experts=2)
    lines = selection_table(normalized, scores).splitlines()
    assert lines[1] == "    3     2 / 4  0.130    2           2  3 0"
    assert lines[-1].endswith("gate scores, p=0.1, of each layer's mass, at least 2 per layer")


def test_the_table_of_a_file_shows_what_the_file_knows():
    assert selection_table(ExpertSelection({"1": [8, 26], "2": []})).splitlines() == [
        "layer  selected  experts",
        "    1         2  8 26",
        "    2         0",
        "2 experts in 2 layers",
    ]


def test_the_overlap_table_counts_by_task_and_compares_every_pair():
    assert overlap_table({"law": FIRST, "code": SECOND}).splitlines() == [
        "layer  law  code  law & code",
        "    2    2     2        0.33",
        "   10    1     1        1.00",
        "  all    3     3        0.67",
    ]
    assert overlap_table({"law": FIRST}).splitlines()[0] == "layer  law"


def test_the_plot_has_a_panel_per_task_with_the_selected_cells_and_one_of_the_overlap(tmp_path, monkeypatch):
    figures = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, path, **kw: figures.append(self))
    plot_selection({"law": FIRST, "code": SECOND}, tmp_path / "selection.png")
    law, code, overlap = figures[0].axes
    assert law.get_title() == "law: 3 experts (37.5%)"
    assert law.collections[0].get_array().tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]
    assert code.collections[0].get_array().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert [label.get_text() for label in law.get_yticklabels()] == ["2", "10"]
    assert [text.get_text() for text in overlap.texts] == ["1.00", "0.67", "0.67", "1.00"]


def test_the_plot_of_one_selection_is_an_image_file(tmp_path):
    pytest.importorskip("matplotlib")
    plot_selection({"law": FIRST}, tmp_path / "selection.png")
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no layer to draw"):
        plot_selection({}, tmp_path / "empty.png")


@pytest.mark.parametrize("selections", [FIRST, [FIRST, SECOND]])
def test_selections_without_names_are_refused(selections, tmp_path):
    for draw in (overlap_table, lambda given: plot_selection(given, tmp_path / "plot.png")):
        with pytest.raises(ValueError, match=r"must be a dict from the name of a task.*write {'my task': selection}"):
            draw(selections)


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_selection needs matplotlib: pip install matplotlib"):
        plot_selection({"law": FIRST}, tmp_path / "selection.png")


@pytest.mark.parametrize("wrong", [None, [1], {"a": 1}, {1: ExpertSelection({"1": [0]})}, "x" * 1000])
def test_what_is_no_dict_of_selections_is_refused(wrong, tmp_path):
    for use in (overlap_table, lambda selections: plot_selection(selections, tmp_path / "plot.png")):
        with pytest.raises(ValueError, match="must be a dict from the name of a task to its selection") as error:
            use(wrong)
        assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="must be an ExpertSelection"):
        selection_table(wrong)
    with pytest.raises(ValueError, match=r"other=.* must be an ExpertSelection"):
        ExpertSelection({"1": [0]}).overlap(wrong)
