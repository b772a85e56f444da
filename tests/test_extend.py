"""The list for parts outside of the package: all of it can be imported, and a researcher's file needs no other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from moe_peft import extend

FILES = sorted(path for path in (Path(__file__).parent / "extend").glob("*.py") if not path.name.startswith("test_"))
# The others are the parts of the suite of laws.
PARTS = [path for path in FILES if path.stem not in ("__init__", "cases", "combinations", "conftest", "worker")]


def test_every_name_of_the_list_is_there():
    assert len(set(extend.__all__)) == len(extend.__all__)
    assert all(getattr(extend, name) is not None for name in extend.__all__)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_a_part_is_one_file_of_less_than_60_lines_that_imports_the_list_alone(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name.startswith("moe_peft")} == {"moe_peft.extend"}
