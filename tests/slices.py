"""Slices of long lists of cases: `make test` runs a slice, `make slow` the rest, and together they run all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest

Case = tuple[str, ...]


def sliced(cases: Iterable[Case], kept: Collection[Case]) -> list:
    """Test parameters of all cases, slow where they are not among those that `make test` runs.

    Args:
        cases: Tuples of texts, which name a test.
        kept: The slice.
    """
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(*case, marks=marks[case in kept], id="-".join(case)) for case in cases]


def diagonal(pairs: Collection[Case], turn: int, *, whole: Collection[str] = (), every: int = 4) -> set[Case]:
    """A slice of pairs (model, method): one method in `every` of each model, other ones of the next model.

    Args:
        pairs: All pairs.
        turn: Number of the slice; those of `every` numbers in a row leave no pair out.
        whole: Models that keep all of their methods.
        every: One of how many.
    """
    models = list(dict.fromkeys(model for model, _ in pairs))
    kept = {pair for pair in pairs if pair[0] in whole}
    for place, model in enumerate(models):
        own = [pair for pair in pairs if pair[0] == model]
        kept |= {pair for number, pair in enumerate(own) if (number + place + turn) % every == 0}
    return kept


def thinned(params: Collection, turn: int, every: int = 2) -> list:
    """Test parameters of pairs, of which a diagonal stays in `make test`; those that are slow stay slow.

    Args:
        params: Parameters (model, method).
        turn: See `diagonal`.
        every: See `diagonal`.
    """
    kept = diagonal([param.values for param in params if not is_slow(param)], turn, every=every)
    return [
        param
        if param.values in kept or is_slow(param)
        else pytest.param(*param.values, id=param.id, marks=[*param.marks, pytest.mark.slow])
        for param in params
    ]


def is_slow(param) -> bool:
    """Whether a test parameter is marked slow."""
    return any(mark.name == "slow" for mark in param.marks)
