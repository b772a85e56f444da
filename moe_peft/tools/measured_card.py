"""A section of a saved adapter's card that says what a tool measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..config.adapter_files import CONFIG
from ..files import write_text
from ..messages import shown

CARD = "README.md"


def add_measured(folder: str | Path, heading: str, says: str, metrics: Mapping[str, float]) -> None:
    """Write figures into a folder's card, in the place of those of the same heading; the rest of the card stays.

    Args:
        folder: Folder of a saved adapter.
        heading: Of the section.
        says: A sentence before the figures.
        metrics: Figure by name.

    Raises:
        ValueError: The folder holds no adapter; nothing has been written.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{shown(str(folder))} holds no {CONFIG}. Save the adapter there first.")
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else "---\nlibrary_name: peft\ntags: [moe-peft]\n---\n"
    old = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in metrics.items()]
    section = "\n".join([f"## {heading}", "", says, "", "| measured | |", "|---|---|", *rows, ""])
    write_text(card, f"{old.sub('', text).rstrip()}\n\n{section}")
