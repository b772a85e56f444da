"""What a caller asks of forwards belongs to its thread, and what was set before comes back."""

from __future__ import annotations

import threading

import pytest
import torch

from moe_peft.forward.thread_state import RowNames
from moe_peft.forward.tracker import ForwardTracker

GROUPS = {"task_type": torch.tensor([0, 1])}


def tracker() -> ForwardTracker:
    return ForwardTracker(lambda module, tracker: {})


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), name="a server's")
    thread.start()
    thread.join()
    return found[0]


def test_groups_and_names_of_rows_are_a_threads_own_and_come_back():
    own, names, x = tracker(), RowNames(("a", "b"), may_repeat=False), torch.ones(2, 3)
    before = own.give_groups(GROUPS), own.give_row_names(names)
    assert own.mixes_rows() and own.row_names(x) == ["a", "b"]
    assert not in_a_thread(own.mixes_rows) and in_a_thread(lambda: own.row_names(x)) is None
    assert own.give_groups(before[0]) is GROUPS and own.give_row_names(before[1]) is names
    assert own.row_names(x) is None


def test_an_observer_is_a_threads_own_and_one_of_training_is_everybodys():
    own = tracker()
    own.observers.append(print)
    assert own.watched() and not in_a_thread(own.watched)
    own.training_observers.append(print)
    assert in_a_thread(own.watched)


def test_adapters_do_not_change_under_another_threads_forward():
    own = tracker()
    own.refuse_in_use("set_adapter")
    own._busy[threading.get_ident()] = threading.current_thread()
    own.refuse_in_use("set_adapter")  # one's own forward may
    assert in_a_thread(lambda: refusal(own)).startswith(
        "set_adapter would change the adapters of a forward that runs in the thread 'MainThread'"
    )


def refusal(own: ForwardTracker) -> str:
    with pytest.raises(RuntimeError) as refused:
        own.refuse_in_use("set_adapter")
    return str(refused.value)
