"""A slice has something of every model, and several of them have everything."""

from __future__ import annotations

import itertools

from tests.slices import diagonal, is_slow, sliced, thinned

PAIRS = list(itertools.product(("a", "b", "c"), ("one", "two", "three", "four", "five")))


def test_slices_in_a_row_leave_no_pair_out_and_each_has_every_model():
    slices = [diagonal(PAIRS, turn, every=3) for turn in range(3)]
    assert set().union(*slices) == set(PAIRS)
    for own in slices:
        assert {model for model, _ in own} == {"a", "b", "c"} and len(own) < len(PAIRS) / 2


def test_whole_models_keep_all_of_their_methods():
    assert {pair for pair in PAIRS if pair[0] == "b"} <= diagonal(PAIRS, 0, whole=("b",))


def test_what_is_not_in_the_slice_is_slow_and_keeps_its_name():
    made = sliced(PAIRS, diagonal(PAIRS, 0))
    assert [param.id for param in made] == ["-".join(pair) for pair in PAIRS]
    slow = {param.values for param in made if param.marks}
    assert slow == set(PAIRS) - diagonal(PAIRS, 0)


def test_a_slice_of_a_slice_keeps_what_was_slow():
    before = sliced(PAIRS, {pair for pair in PAIRS if pair[0] != "c"})
    after = thinned(before, 1)
    assert [param.id for param in after] == [param.id for param in before]
    kept = {param.values for param in after if not is_slow(param)}
    assert {model for model, _ in kept} == {"a", "b"} and len(kept) == 5
    both = kept | {param.values for param in thinned(before, 2) if not is_slow(param)}
    assert both == {pair for pair in PAIRS if pair[0] != "c"}
