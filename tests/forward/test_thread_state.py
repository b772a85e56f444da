"""What a thread knows is its own, and a name for each row stays with the row where generation repeats it."""

from __future__ import annotations

import threading

import pytest

from moe_peft.forward.thread_state import RowNames, ThreadState


@pytest.mark.parametrize("times", [1, 2, 5])
def test_rows_that_are_repeated_keep_their_name(times):
    names = RowNames(("a", "b", "__base__"), may_repeat=True).of_rows(3 * times)
    assert names == [name for name in ("a", "b", "__base__") for _ in range(times)]


@pytest.mark.parametrize("num_rows", [0, 1, 2, 4, 6, 7])
def test_names_that_do_not_fit_the_rows_are_given_as_they_are(num_rows):
    """So that the layer can refuse them by their number."""
    assert RowNames(("a", "b", "c"), may_repeat=False).of_rows(num_rows) == ["a", "b", "c"]
    assert RowNames((), may_repeat=True).of_rows(num_rows) == []


def test_every_thread_finds_a_state_of_its_own():
    state, seen = ThreadState(), []
    state.observers.append(print)
    state.row_names = RowNames(("a",), may_repeat=False)

    def look() -> None:
        seen.append((list(state.observers), state.row_names, list(state.calls)))
        state.led["block", "default"] = None

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [([], None, [])]
    assert state.observers == [print] and state.led == {}
