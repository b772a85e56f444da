"""Draws docs/architecture.svg: the rooms of the package in the order of imports that pyproject.toml enforces.

Run from anywhere: `python docs/draw_architecture.py`. A room imports only what stands below it.
"""

from __future__ import annotations

import ast
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
WIDTH, ROW, GAP, PAD = 960, 62, 10, 14
FONT = 'font-family="Helvetica, Arial, sans-serif"'
FILL, EDGE, TEXT, FAINT = "#e9edf2", "#1f5fa8", "#14273d", "#51606f"


def layers() -> list[list[str]]:
    """Rooms of each layer, the top first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^layers = (\[.*?\])", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return [[room.strip() for room in layer.split("|")] for layer in ast.literal_eval(found.group(1))]


def sentence(room: str) -> str:
    """The first line of a room's docstring, up to its first full stop or colon."""
    path = ROOT / "moe_peft" / room
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return re.split(r"[:.;](?:\s|$)", first)[0]


def lines(text: str, width: int) -> list[str]:
    """At most two lines of a text that fit into a number of pixels of small type."""
    limit, done = max(int(width / 5.9), 8), [""]
    for word in text.split():
        if len(done[-1]) + len(word) + 1 > limit and done[-1]:
            done.append("")
        done[-1] = f"{done[-1]} {word}".strip()
    return done if len(done) < 3 else [done[0], f"{done[1][: limit - 3]}..."]


def box(room: str, x: float, y: float, width: float) -> str:
    """One room: its name, and what it is."""
    parts = [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{ROW}" rx="6" fill="{FILL}" stroke="{EDGE}"/>',
        f'<text x="{x + 10:.0f}" y="{y + 20:.0f}" {FONT} font-size="14" font-weight="bold" fill="{TEXT}">'
        f"{room}</text>",
    ]
    for number, line in enumerate(lines(sentence(room), int(width - 20))):
        place = f'x="{x + 10:.0f}" y="{y + 37 + 14 * number:.0f}"'
        parts.append(f'<text {place} {FONT} font-size="11" fill="{FAINT}">{escape(line)}</text>')
    return "\n".join(parts)


def draw() -> str:
    """The picture as text."""
    rows = layers()
    height = len(rows) * (ROW + GAP) + 2 * PAD + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>The rooms of moe_peft: each imports only what stands below it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, rooms in enumerate(rows):
        width = (WIDTH - 2 * PAD - GAP * (len(rooms) - 1)) / len(rooms)
        for column, room in enumerate(rooms):
            parts.append(box(room, PAD + column * (width + GAP), PAD + number * (ROW + GAP), width))
    note = f'<text x="{PAD}" y="{height - 10}" {FONT} font-size="11" fill="{FAINT}">'
    parts.append(f"{note}Imports point downwards only; rooms of one row do not import each other.</text>")
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
