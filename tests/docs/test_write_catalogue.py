"""The catalogue is what the parts say of themselves."""

from __future__ import annotations

import re

import pytest

from moe_peft import extend
from tests.docs.pages import DOCS
from tests.loading import load_file

WRITER = load_file(DOCS / "write_catalogue.py")
PAGE = (DOCS / "catalogue.md").read_text()


def test_the_page_is_written_from_the_registries():
    assert WRITER.written() == PAGE, "run python docs/write_catalogue.py"


@pytest.mark.parametrize("axis", ["SCORERS", "GATES", "SELECTORS", "ROUTERS", "EXPERTS", "LOSSES"])
def test_every_registered_part_has_a_section_with_its_options(axis):
    for name, part in getattr(extend, axis).items():
        assert f"### {name}\n" in PAGE
        for option in part.options:
            assert f"| `{option.name}` | `{option.default!r}` |" in PAGE


def test_a_part_of_the_literature_names_its_paper():
    sections = re.split(r"^### ", PAGE.partition("## Presets")[0], flags=re.MULTILINE)[1:]
    without = {text.split("\n")[0] for text in sections if not re.search(r"\b\d{4}\.\d{5}\b", text)}
    assert without <= {"linear", "softmax"}
