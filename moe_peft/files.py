"""Files that are written beside and renamed, so that neither a reader nor an interrupted writer meets half of one."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends without an error.

    It lies in the same folder, as only there a rename is one step, and is gone when the block fails.

    Args:
        path: File to write; a link is followed, so that what it points to is replaced.

    Yields:
        The new file, open for writing bytes.
    """
    path = Path(os.path.realpath(path))
    new = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.new")
    try:
        with open(new, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(new, path.stat().st_mode & 0o7777)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one step.

    Args:
        path: File to write or replace.
        text: Its whole content.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder that is there with all that it holds once the block ends without an error, and not before.

    It grows beside its place, as only there a rename is one step, and is gone when the block fails or is interrupted.

    Args:
        path: The folder; it must not exist, or be empty.

    Yields:
        The growing folder.

    Raises:
        ValueError: There is something at `path`; nothing has been written.
    """
    path = Path(os.path.realpath(path))
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    growing = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.new")
    try:
        growing.mkdir()
        yield growing
        if path.is_dir():
            path.rmdir()
        os.replace(growing, path)
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise


@contextmanager
def filled_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder as `new_folder` does, or put files into one that is there once the block ends without an error.

    Args:
        path: The folder; files of the same names are replaced, others stay.

    Yields:
        The growing folder.
    """
    path = Path(os.path.realpath(path))
    if not path.is_dir() or not any(path.iterdir()):
        with new_folder(path) as growing:
            yield growing
        return
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:64]}.", suffix=".new", dir=path.parent) as beside:
        yield Path(beside)
        for file in sorted(Path(beside).iterdir()):
            os.replace(file, path / file.name)


def check_free(path: str | Path) -> None:
    """Refuse a place for a new folder where something lies.

    Args:
        path: The folder that is to be made.

    Raises:
        ValueError: It holds files, or is one.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        kind = "is a file" if path.is_file() else "holds files"
        raise ValueError(f"{str(path)[:200]} {kind}. Name a folder that does not exist yet, or is empty.")
