"""`moe-peft compress`: an adapter in a fraction of its bytes."""

from __future__ import annotations

import argparse

from ..tools.compress import compress_adapter
from .inspect import local_folder


def run(argv: list[str]) -> int:
    """Write a compressed adapter, and print its size and error.

    Args:
        argv: The words after the verb.

    Raises:
        ValueError: The folder holds no adapter, or there are files at the output; nothing has been written.
    """
    parser = argparse.ArgumentParser(
        prog="moe-peft compress",
        description="Keep of what training changed the largest part, by its signs and one scale for each tensor "
        "(ComPEFT). It is an approximation, whose error is printed; routers stay as they are. moe-peft decompress "
        "makes an adapter of it.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder of an adapter, or its name on the Hub")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument("--initial", metavar="FOLDER", help="the same adapter as it was before training")
    parser.add_argument("--density", type=float, default=0.2, help="share of the numbers that stay; default: 0.2")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--alpha", type=float, default=1.0, help="scale over the standard deviation; default: 1")
    scale.add_argument("--least_error", action="store_true", help="take the scale of least error instead")
    parser.add_argument(
        "--from_zero", action="store_true", help="compress matrices of unknown random start too, as if it were zero"
    )
    given = parser.parse_args(argv)
    found = compress_adapter(
        local_folder(given.adapter),
        given.output,
        given.density,
        alpha=None if given.least_error else given.alpha,
        initial=given.initial,
        from_zero=given.from_zero,
    )
    print(f"{given.output}: {found}")
    return 0
