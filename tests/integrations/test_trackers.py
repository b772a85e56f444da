"""Trackers are found wherever in a tree adapted models are, each once."""

from __future__ import annotations

from torch import nn

from moe_peft.forward.tracker import find_tracker
from moe_peft.integrations.trackers import find_trackers
from tests.integrations.test_callback import adapted
from tests.tiny import tiny_llama


def test_every_adapted_model_of_a_tree_has_its_tracker_in_the_list_once():
    first, second = adapted(), adapted()
    tree = nn.Sequential(tiny_llama(), nn.ModuleList([first, nn.ModuleDict({"again": first, "other": second})]))
    assert find_trackers(tree) == [find_tracker(first), find_tracker(second)]
    assert find_trackers(first) == [find_tracker(first)]
    assert find_trackers(tiny_llama()) == []
