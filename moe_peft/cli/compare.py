"""`moe-peft compare`: train several methods at equal size on the same data, and compare them."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from .launch import PROGRAM
from .shipped import shipped


def run(argv: list[str]) -> int:
    """Compare, in this process and one for each run.

    Args:
        argv: The words after the verb.

    Returns:
        0 once everything has been written.

    Raises:
        ValueError: Runs cannot be compared, or one of them failed.
    """
    folder, named = str(shipped("train")), os.environ.get(PROGRAM)
    sys.path.insert(0, folder)
    os.environ[PROGRAM] = "moe-peft compare"
    try:
        import_module("compare").main(argv)
    finally:
        sys.path.remove(folder)
        os.environ.pop(PROGRAM) if named is None else os.environ.update({PROGRAM: named})
    return 0
