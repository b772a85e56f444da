"""Which of a backbone's experts an adapter goes with: their places, on every device that asks."""

from __future__ import annotations

import copy

import torch

from moe_peft.experts import Selection


def test_places_are_those_in_the_selection_and_its_length_for_every_other_slot():
    selection = Selection([1, 4], num_backbone_experts=6)
    index = torch.tensor([[0, 1], [4, 5], [6, 99]])
    assert selection.local(index).tolist() == [[2, 0], [1, 2], [2, 2]]
    assert len(selection) == 2 and list(selection) == [1, 4]
    assert repr(selection) == "Selection([1, 4] of 6)"


def test_tables_are_kept_for_one_device_and_copied_with_the_selection():
    selection = Selection([0], num_backbone_experts=2)
    selection.keep_on(torch.device("cpu"))
    twin = copy.deepcopy(selection)
    selection.keep_on(torch.device("meta"))
    for own in (selection, twin):
        assert own.local(torch.tensor([[0, 1]])).tolist() == [[0, 1]]
