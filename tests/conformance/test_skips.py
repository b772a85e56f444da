import re

import pytest

from .skips import SKIPS


@pytest.mark.parametrize("entry", SKIPS, ids=lambda entry: entry.tests)
def test_entry_matches_a_test(entry, collected):
    assert any(re.search(entry.tests, test) for test in collected), "remove the entry from skips.py"


def test_at_most_one_entry_matches_a_test(collected):
    matches = {test: [entry.tests for entry in SKIPS if re.search(entry.tests, test)] for test in collected}
    assert {test: entries for test, entries in matches.items() if len(entries) > 1} == {}
