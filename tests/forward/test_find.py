"""Trackers are found wherever in a tree adapted models are, each once; a stack is what reads a batch."""

from __future__ import annotations

import pytest
from torch import nn

from moe_peft.forward.find import find_stacks, find_tracker, find_trackers
from tests.integrations.test_callback import adapted
from tests.tiny import tiny_llama, tiny_t5


def test_every_adapted_model_of_a_tree_has_its_tracker_in_the_list_once():
    first, second = adapted(), adapted()
    tree = nn.Sequential(tiny_llama(), nn.ModuleList([first, nn.ModuleDict({"again": first, "other": second})]))
    assert find_trackers(tree) == [find_tracker(first), find_tracker(second)]
    assert find_trackers(first) == [find_tracker(first)]
    assert find_trackers(tiny_llama()) == []


def test_what_is_no_model_has_no_tracker_and_says_so_within_the_limit():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not 'xxx") as refusal:
        find_trackers("x" * 10_000)
    assert len(str(refusal.value)) < 400


def test_the_stacks_of_a_model_are_its_encoder_and_decoder_or_its_backbone_or_itself():
    llama, t5, plain = tiny_llama(), tiny_t5(), nn.Linear(2, 2)
    assert find_stacks(llama) == [llama.model]
    assert find_stacks(t5) == [t5.encoder, t5.decoder]
    assert find_stacks(plain) == [plain]
