"""Selected experts are compared layer by layer, and come back from their file; another form is refused."""

from __future__ import annotations

import json

import pytest

from moe_peft import ExpertSelection


def test_the_overlap_of_two_selections_is_their_jaccard_index_by_layer():
    first = ExpertSelection({"2": [1, 2], "10": [3], "11": [], "12": [7]})
    second = ExpertSelection({"2": [2, 3, 4], "10": [3], "11": []})
    assert first.overlap(second) == second.overlap(first) == {"2": 0.25, "10": 1.0, "11": 1.0, "12": 0.0}
    assert set(first.overlap(first).values()) == {1.0}


def test_a_selection_comes_back_from_its_file(tmp_path):
    selection = ExpertSelection({"1": [8, 26], "2": [], "10": [5]}, shared_experts=True)
    selection.save(tmp_path / "config.json")
    loaded = ExpertSelection.load(tmp_path / "config.json")
    assert loaded == selection and list(loaded.experts) == ["1", "2", "10"]
    assert (loaded.share, loaded.num_parameters, loaded.num_selected) == (None, None, 3)


def test_the_file_tells_how_many_experts_the_backbone_has(tmp_path):
    selection = ExpertSelection({"1": [8, 26]}, num_experts={"1": 64})
    selection.save(tmp_path / "config.json")
    content = json.loads((tmp_path / "config.json").read_text())
    assert list(content) == ["experts", "shared_experts", "non_expert_modules", "num_experts"]
    assert ExpertSelection.load(tmp_path / "config.json").share == 2 / 64


def test_a_file_that_trains_everything_else_says_what_to_write_instead(tmp_path):
    path = tmp_path / "config.json"
    content = {"experts": {"1": [8]}, "shared_experts": False, "non_expert_modules": True}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json: non_expert_modules=True .*modules_to_save=.*train_router"):
        ExpertSelection.load(path)
    with pytest.raises(ValueError, match="non_expert_modules=True"):
        ExpertSelection({"1": [8]}, non_expert_modules=True)


@pytest.mark.parametrize(
    "content", [{}, [], {"experts": [1]}, {"experts": {"one": [1]}}, {"experts": {"1": [1, 1]}}, {"experts": {"1": 3}}]
)
def test_a_file_of_another_form_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is no selection of experts: it must hold"):
        ExpertSelection.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": {1: [0]}}, "a dict from layers as strings"),
        ({"experts": {"1": [0, 0]}}, "is no selection"),
        ({"experts": {"1": [0]}, "num_experts": {"1": 0}}, "num_experts=.* to whole numbers"),
        ({"experts": {"1": [0]}, "shared_experts": 1}, "shared_experts=1 must be True or False"),
    ],
)
def test_what_is_no_selection_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpertSelection(**arguments)


def test_selections_are_compared_with_selections_alone():
    with pytest.raises(ValueError, match="must be an ExpertSelection"):
        ExpertSelection({"1": [0]}).overlap({"1": [0]})
