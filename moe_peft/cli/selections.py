"""`moe-peft selections`: how far the experts that tasks select are the same, and selections joined to one."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..selection import ExpertSelection, join_selections, overlap_table
from ..selection.join import WAYS

SELECTION = "expert_config.json"


def run(argv: list[str]) -> int:
    """Print a table of the overlap, and write the joined selection.

    Args:
        argv: The words after the verb: selections as NAME=FILE or FILE, and flags.

    Raises:
        ValueError: A file holds no selection, or they are of different backbones; nothing has been written.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft selections",
        description="Compare which experts tasks select, layer by layer, and join selections to train one adapter.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "selections", nargs="+", metavar="[NAME=]FILE", help="what select-experts has written, or its folder"
    )
    parser.add_argument(
        "--join", choices=WAYS, help="take the experts of any, of all, or of the most of them; needs --output"
    )
    parser.add_argument("--output", metavar="FILE", help="where to write the joined selection")
    given = parser.parse_args(argv)
    if (given.join is None) != (given.output is None):
        raise ValueError("--join and --output go together. Give both, or none.")
    found = _named(given.selections)
    print(overlap_table(found))
    if given.join is not None:
        joined = join_selections(found.values(), how=given.join)
        joined.save(given.output)
        print(f"{given.output} holds {joined.num_selected} experts of {given.join}")
    return 0


def _named(words: list[str]) -> dict[str, ExpertSelection]:
    """Name of a task -> its selection; a folder's or file's own name where none is given."""
    found: dict[str, ExpertSelection] = {}
    for word in words:
        name, equals, file = word.partition("=")
        path = Path(file if equals else word)
        path = path / SELECTION if path.is_dir() else path
        own = name if equals else (path.parent.name if path.name == SELECTION else path.stem)
        if own in found:
            raise ValueError(f"Two selections are called {own}. Write NAME=FILE with different names.")
        if not path.is_file():
            raise ValueError(f"{path} is no file. Name what moe-peft select-experts has written.")
        found[own] = ExpertSelection.load(path)
    return found
