"""Every adapter type has a page, with the equation's source, and with all of its fields as they are."""

from __future__ import annotations

import dataclasses

import pytest

from moe_peft.methods import METHODS
from tests.docs.pages import DOCS
from tests.loading import load_file

WRITER = load_file(DOCS / "write_fields.py")
PAGES = sorted((DOCS / "methods").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_hold_the_fields_of_today(page):
    assert page.read_text() == WRITER.written(page.read_text()), "run python docs/write_fields.py"


def test_every_type_has_a_page_with_its_source_and_its_fields():
    assert {page.stem for page in PAGES} == set(METHODS)
    for name, config in METHODS.items():
        text = (DOCS / "methods" / f"{name}.md").read_text()
        assert f"<!-- fields: {config.__name__} -->" in text
        assert not config.source.startswith("arXiv") or f"https://arxiv.org/abs/{config.source.split()[1]}" in text
        for heading in ("\n## Use it\n", "\n## Fields\n", "\n## Traps\n"):
            assert heading in text, (name, heading)


@pytest.mark.parametrize("config", METHODS.values(), ids=lambda config: config.__name__)
def test_tables_name_what_a_user_may_set_and_say_what_it_means(config):
    named = {own.name for own in WRITER.fields_of(config)}
    assert not named & (config.absent_fields.keys() | config.fixed_fields.keys())
    assert all(own.metadata.get("help") for own in WRITER.fields_of(config))
    left_out = {own.name for own in dataclasses.fields(config)} - named
    assert left_out == WRITER.STOCK | (left_out & (config.absent_fields.keys() | config.fixed_fields.keys()))
