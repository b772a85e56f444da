"""Imports files of the user's own, which register parts and methods, before anything else is read.

moe-peft sft --moe_import my_parts.py --moe_method my_method ...
moe-peft inspect --moe_import my_parts outputs/run
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..messages import shown

FLAG = "--moe_import"


def named_imports(words: Sequence[str]) -> list[str]:
    """What a command line names to be imported, several with one flag too, as its parser takes them.

    Args:
        words: Its words, which are flags with their values.

    Raises:
        ValueError: The flag stands without a value.
    """
    return _split(words)[0]


def taken_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a command line names to be imported, one with each flag, and its words without them.

    Args:
        words: Its words, of a verb whose own parser does not know the flag and may take words without one.

    Raises:
        ValueError: The flag stands without a value.
    """
    return _split(words, most=1)


def import_parts(names: Sequence[str]) -> None:
    """Import files and modules by name.

    Args:
        names: Files that end in `.py`, or modules that can be found from the working directory.

    Raises:
        ValueError: There is no such file or module, or another module has the file's name.
    """
    for name in names:
        path = Path(name)
        if path.suffix == ".py":
            _import_file(path)
        else:
            _import_module(name)


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{FLAG} {path}: there is no such file. Name a file, or a module without .py.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = import_module(path.stem)
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != path.resolve():
        raise ValueError(
            f"{FLAG} {path}: another module is called {shown(path.stem)} ({found}). Give the file another name."
        )


def _import_module(name: str) -> None:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ValueError(f"{FLAG} {name}: there is no such module. For a file write its path, as {name}.py.")
    import_module(name)


def _split(words: Sequence[str], most: int | None = None) -> tuple[list[str], list[str]]:
    """The values of the flag, and the other words."""
    values: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(words):
        flag, equals, own = words[index].partition("=")
        index += 1
        if flag not in (FLAG, "--moe-import"):
            rest.append(words[index - 1])
            continue
        if equals:
            values.append(own)
            continue
        first = index
        while index < len(words) and not words[index].startswith("--") and (most is None or index - first < most):
            values.append(words[index])
            index += 1
        if index == first:
            raise ValueError(f"{FLAG} needs a file with parts or methods of your own, or the name of a module.")
    return values, rest
