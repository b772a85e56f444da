"""Which sums processes join, and when they need not ask each other; several processes run in tests/processes."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from moe_peft.forward.joined_losses import LayerLosses
from moe_peft.forward.shared_sums import SharedSums
from moe_peft.losses import LOSSES
from moe_peft.types import RouterLoss

CPU = torch.device("cpu")


def measured(*names: str) -> LayerLosses:
    losses: dict[str, RouterLoss] = {name: LOSSES[name]() for name in names}
    own = {name: torch.arange(2.0) + number for number, name in enumerate(names)}
    return LayerLosses(losses, dict.fromkeys(names, 1.0), "global_batch", own)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_a_process_has_not_called_is_given_beside_its_own_sums(group):
    shared = SharedSums()
    assert shared.join({("up", "a", 0): measured("z_loss"), ("down", "a", 0): measured("z_loss")}, CPU) == {}
    layer = measured("z_loss", "token_entropy")
    absent = shared.join({("up", "a", 0): layer}, CPU)
    assert layer.joined == layer.own and layer.count == 1
    assert {(slot.place, slot.loss) for slot in absent} == {("down", "z_loss")}
    assert len(shared.order) == 3
    assert not any(sums.any() for sums in absent.values())


def test_an_order_is_settled_once_no_place_can_come_that_it_lacks(group):
    shared = SharedSums()
    places = {("up", "a"): False, ("down", "a"): False}
    shared.join({("up", "a", 0): measured("z_loss")}, CPU)
    shared.settle(places)
    assert not shared.settled
    shared.join({("down", "a", 0): measured("z_loss")}, CPU)
    shared.settle(places)
    assert shared.settled
    shared.settle({("up", "a"): True})
    assert not shared.settled
    shared.join({("up", "a", 1): measured("z_loss")}, CPU)
    shared.settle(places)
    assert not shared.settled


def test_a_call_that_a_settled_order_lacks_is_refused():
    shared = SharedSums()
    shared.settle({})
    with pytest.raises(RuntimeError, match=r"'up' is called 3 times in one forward.*scope='micro_batch'"):
        shared.join({("up", "a", 2): measured("z_loss")}, CPU)
