"""Files that are written beside and renamed, so that neither a reader nor an interrupted writer meets half of one."""

from __future__ import annotations

import os
import secrets
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
