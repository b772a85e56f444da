"""Configurations with values of wrong sorts: a slice of them in every run of the tests, thousands with `make fuzz`."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterable
from functools import cache

import pytest

from tests.tiny import padded_batch

from .laws import BrokenLawError
from .values import CLASSES, VALUES, Case, all_cases, base_for, check_case, draw_case, fields_of

SLICE, CHUNK = 280, 200
CASES = int(os.environ.get("FUZZ_CASES", "6000"))


@cache
def frozen(cls: str):
    return base_for(cls)


def check(cases: Iterable[Case]) -> None:
    """All failures of some cases at once, one for each law."""
    batch = padded_batch([5, 3])
    batch["labels"] = batch["input_ids"]
    failures = {}
    for case in cases:
        try:
            check_case(case, copy.deepcopy(frozen(case.cls)), batch)
        except BrokenLawError as error:
            failures.setdefault(error.law, f"{case}\n-> {error}")
    assert not failures, "\n".join(failures.values())


def test_wrong_and_extreme_values_get_clear_errors():
    check(random.Random(0).sample(all_cases(), SLICE))


@pytest.mark.fuzz
@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_many_wrong_and_extreme_values_get_clear_errors(first):
    cases = all_cases()
    random.Random(1).shuffle(cases)
    check(cases[first : first + CHUNK])


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(CASES // CHUNK // 4))
def test_several_wrong_values_at_once_get_clear_errors(seed):
    rng = random.Random(seed)
    check(draw_case(rng) for _ in range(CHUNK))


def test_every_field_is_tried():
    cases = all_cases()
    for cls in CLASSES:
        assert {name for case in cases if case.cls == cls for name in case.fields} == set(fields_of(cls))
    assert len(cases) == len(VALUES) * sum(len(fields_of(cls)) for cls in CLASSES)


def test_bare_error_is_found(monkeypatch):
    monkeypatch.setattr("moe_peft.LoraMoeConfig.validate", lambda self: 1 / 0)
    with pytest.raises(AssertionError, match=r"ZeroDivisionError[\s\S]*LoraMoeConfig\(r=4\)"):
        check([Case("LoraMoeConfig", {"r": 4})])
