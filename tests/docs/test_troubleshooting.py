"""Every message on the page on troubleshooting is one that the code gives."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from moe_peft.methods import METHODS
from tests.docs.pages import DOCS, ROOT

GAP = "\0"  # where a message shows a value
ROWS = re.findall(r"^\| (`[^`]+`[^|]*) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@cache
def templates() -> list[str]:
    """All texts of the package and the scripts, with gaps for what is filled in."""
    found = []
    for path in [*(ROOT / "moe_peft").rglob("*.py"), *(ROOT / "train").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def given_by(message: str, texts: list[str]) -> bool:
    """Whether one of the texts has the words of a message in their order; `...` stands for anything."""
    pieces = [piece for piece in message.split("...") if piece.strip()]
    pattern = re.compile(".*".join(map(re.escape, pieces)).replace("\\ ", " "), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def of_field(message: str) -> bool:
    """Whether a message is a refusal of a field, whose end is a text of its own: `field=... must be END`."""
    found = re.fullmatch(r"(\w+)=\.\.\. must be (.*)", message)
    known = found and any(found[1] in config.__dataclass_fields__ for config in METHODS.values())
    return bool(known) and given_by(found[2], templates())


@pytest.mark.parametrize("row", ROWS)
def test_the_code_gives_the_message(row):
    message = re.match(r"`([^`]*)`", row)[1]
    if message.startswith("KeyError"):
        types = {config.adapter_type for config in METHODS.values()}
        assert set(re.findall(r"'([A-Z_]+)'", row)) == types
        return
    assert of_field(message) or given_by(message, templates()), message


def test_there_are_rows_and_a_message_that_nobody_gives_is_seen():
    assert len(ROWS) > 50
    assert not given_by("The moon ... is full", templates())
    assert not of_field("r=... must be the moon") and not of_field("moon=... must be one group per expert")
    assert given_by("attach: ... has no routed adapter", templates())


def test_the_way_out_of_the_missing_import_stands_where_adapters_are_loaded():
    for name in ("start.md", "deploy.md", "troubleshooting.md"):
        assert "import moe_peft" in (DOCS / name).read_text() and "KeyError: '" in (DOCS / name).read_text()
