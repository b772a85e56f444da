"""Selections of several tasks are joined by how many tasks select an expert."""

from __future__ import annotations

import pytest

from moe_peft import EsftConfig, ExpertSelection, join_selections

SIZES = {"0": 6, "1": 6}
TASKS = [
    ExpertSelection({"0": [5, 1], "1": [2]}, num_experts=SIZES, expert_parameters={"0": 10, "1": 10}),
    ExpertSelection({"0": [1, 3]}, shared_experts=True, num_experts=SIZES),
    ExpertSelection({"0": [1, 5, 0], "1": []}, num_experts=SIZES),
]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("any", {"0": [1, 5, 0, 3], "1": [2]}),
        ("all", {"0": [1], "1": []}),
        ("most", {"0": [1, 5], "1": []}),
    ],
)
def test_experts_of_any_all_or_most_tasks_are_taken(how, expected):
    found = join_selections(iter(TASKS), how)
    assert found.experts == expected and found.shared_experts and found.num_experts == SIZES
    assert found.num_parameters == 10 * found.num_selected
    assert EsftConfig(experts=found.experts).experts["0"] == sorted(expected["0"])


def test_one_selection_is_itself_and_other_backbones_are_refused():
    assert join_selections(TASKS[:1]).experts["0"] == [1, 5]
    other = ExpertSelection({"0": [1]}, num_experts={"0": 8})
    for selections, how, message in (
        ([], "any", "one or more"),
        ([{"0": [1]}], "any", "one or more"),
        (TASKS, "some", "must be one of"),
        ([TASKS[0], other], "any", "different backbones"),
    ):
        with pytest.raises(ValueError, match=message):
            join_selections(selections, how)


@pytest.mark.parametrize("given", [None, 3, [], ["selection"], {"law": None}])
def test_what_are_no_selections_is_refused(given):
    with pytest.raises(ValueError, match="must be a list of one or more of what select_experts returns"):
        join_selections(given)
