"""`moe-peft decompress`: an adapter again of one that was compressed."""

from __future__ import annotations

import argparse

from ..tools.compress import decompress_adapter
from .inspect import local_folder


def run(argv: list[str]) -> int:
    """Write the adapter.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: The folder holds no compressed adapter, or there are files at the output; nothing has been written.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft decompress",
        description="Make an adapter again of what moe-peft compress has written.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder of a compressed adapter, or its name on the Hub")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--initial", metavar="FOLDER", help="the folder that compress was given as --initial")
    given = parser.parse_args(argv)
    decompress_adapter(local_folder(given.adapter), given.output, initial=given.initial)
    print(f"{given.output} holds an adapter")
    return 0
