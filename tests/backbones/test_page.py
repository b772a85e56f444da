"""The page on backbones says what the models of the sweep say."""

from __future__ import annotations

from tests.backbones.models import FOLLOWED, OPAQUE, TYPES, known
from tests.backbones.multimodal_models import MULTIMODAL
from tests.backbones.table import PAGE, tables


def test_the_tables_of_the_page_are_those_of_the_models():
    text = PAGE.read_text()
    if all(known(model_type) for model_type in (*TYPES, *MULTIMODAL)):
        for table in tables():
            assert table in text, "run: python -m tests.backbones.table"
    else:
        assert all(line in text for table in tables() for line in table.splitlines())


def test_at_least_forty_types_are_followed():
    assert len(FOLLOWED) >= 40 and len(FOLLOWED) + len(OPAQUE) == len(TYPES)
