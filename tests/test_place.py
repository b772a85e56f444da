"""Two places are the same where name and sizes are, whatever module stands there."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from moe_peft.place import Place


def test_places_are_compared_by_what_they_say_and_not_by_the_module_that_stands_there():
    here, there = (Place("layers.0.q", 4, 4, base=nn.Linear(4, 4)) for _ in range(2))
    assert here == there and hash(here) == hash(there)
    assert here != dataclasses.replace(here, leader="layers.0.k") and "Linear(" not in repr(here)


def test_a_place_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Place("layers.0.q", 4, 4).name = "layers.1.q"
