"""The memory table of docs/scale.md is what the models' sizes and `describe` say."""

from __future__ import annotations

import pytest

from tests.docs.pages import DOCS
from tests.loading import load_file

WRITER = load_file(DOCS / "write_scale.py")
PAGE = (DOCS / "scale.md").read_text()


def assert_current(name):
    assert f"| {' | '.join(WRITER.row(name))} |" in PAGE.splitlines(), "run python docs/write_scale.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITER.MODELS)
def test_the_table_is_written_from_the_models(name):
    assert_current(name)


def test_the_page_has_a_row_for_every_model_and_the_first_is_current():
    rows = [line.split(" | ")[0].lstrip("| ") for line in PAGE.splitlines()]
    assert [name for name in rows if name in WRITER.MODELS] == list(WRITER.MODELS)
    assert WRITER.written(PAGE, "| model | new |") != PAGE
    assert_current(next(iter(WRITER.MODELS)))
