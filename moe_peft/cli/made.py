"""An adapter that a verb has made of another one, saved whole in a new folder with the other's tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import new_folder
from ..tools.export_merged import tokenizer_files

# Names in memory: of the adapter that was read, and of the one that is made, which files need no name for.
BEFORE, MADE = "before", "default"


def save_made(model: Any, output: str | Path, source: Path, finish: Callable[[Path], None] | None = None) -> None:
    """Save the adapter `MADE`.

    Args:
        model: The model with it.
        output: The folder to make.
        source: Folder of the adapter that it was made of.
        finish: What else is written into the growing folder.

    Raises:
        ValueError: There are files at `output`; nothing has been written.
    """
    with new_folder(output) as growing:
        model.save_pretrained(str(growing), selected_adapters=[MADE])
        for path in tokenizer_files(source):
            shutil.copyfile(path, growing / path.name)
        if finish is not None:
            finish(growing)
