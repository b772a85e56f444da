"""`moe-peft compare`: train several methods at equal size on the same data, and compare them."""

from __future__ import annotations

import sys
from importlib import import_module

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
    folder = str(shipped("train"))
    sys.path.insert(0, folder)
    try:
        import_module("compare").main(argv)
    finally:
        sys.path.remove(folder)
    return 0
