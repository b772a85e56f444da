"""The reference has every public name."""

from __future__ import annotations

import inspect
import re
import sys

import pytest

import moe_peft
from moe_peft import experts, losses, routers, telemetry, tools
from tests.docs.pages import DOCS

PAGES = (DOCS / "reference.md").read_text() + (DOCS / "reference_parts.md").read_text()
NAMED = set(re.findall(r"^::: ([\w.]+)$", PAGES, re.MULTILINE))


def test_rooms_are_written_out_name_by_name():
    assert {room.__name__ for room in (moe_peft, telemetry, tools, routers, experts, losses)} <= NAMED
    for room in (telemetry, tools, routers, experts, losses):
        assert all(hasattr(room, name) for name in room.__all__)


@pytest.mark.parametrize(
    "room", [moe_peft, telemetry, tools, routers, experts, losses], ids=lambda room: room.__name__
)
def test_a_name_that_its_own_module_has_too_stands_apart(room):
    """Who reads the sources alone takes such a name for the module, and leaves the function out."""
    for name in room.__all__:
        found = getattr(room, name)
        module = getattr(found, "__module__", "")
        if (inspect.isfunction(found) or inspect.isclass(found)) and module.endswith(f".{name}"):
            shadowed = not inspect.ismodule(getattr(sys.modules[module.rpartition(".")[0]], name))
            assert not shadowed or f"{module}.{name}" in NAMED, f"write ::: {module}.{name} into docs/reference.md"


@pytest.mark.parametrize("room", [moe_peft, telemetry, tools], ids=lambda room: room.__name__)
def test_public_functions_and_classes_have_docstrings(room):
    for name in room.__all__:
        found = getattr(room, name)
        assert not callable(found) or inspect.getdoc(found), name
