"""`moe-peft configs`: the configurations that ship with the package, for `--config NAME`."""

from __future__ import annotations

import argparse

from ..tables import table
from .shipped import KINDS, find_config, names_of

TITLES = {
    "runs": "whole runs, for --config NAME",
    "methods": "each paper's values of the moe_ flags, for --moe_config NAME or --moe_preset NAME",
    "accelerate": "launchers, for --config_file NAME",
}


def run(argv: list[str]) -> int:
    """List them, or print one.

    Args:
        argv: The words after the verb.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft configs",
        description="List the configurations that ship with the package, or print one, to copy and change: "
        "moe-peft configs olmoe_1b_7b_esft > run.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", help="configuration to print, such as olmoe_1b_7b_esft or methods/sira")
    given = parser.parse_args(argv)
    if given.name is not None:
        print(find_config(given.name, "").read_text(encoding="utf-8"), end="")
        return 0
    for kind in KINDS:
        files = names_of(kind)
        rows = [(name, _first_words(path.read_text(encoding="utf-8"))) for name, path in files.items()]
        print(f"{kind}: {TITLES[kind]}\n{table(rows, '<', indent=2)}")
    return 0


def _first_words(text: str) -> str:
    """What a file's first comment says, without its command."""
    first = text.partition("\n")[0].lstrip("# ")
    return first.partition(": accelerate launch")[0].rstrip(":")
