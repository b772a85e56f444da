"""Files of rows: the kinds that are read, and the line of a broken one, named before a model is loaded."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_peft.messages import shown

# Ending of a file -> the builder of `datasets` that reads it.
BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
START = 1 << 20  # bytes of a file that are looked at before it is read
CONVERT = "Convert it, as with `iconv -f latin1 -t utf-8`."
EXAMPLE = '{"prompt": "The sky is", "completion": " blue."}'


def kinds() -> str:
    """Endings of the files that are read."""
    return ", ".join(sorted(BUILDERS))


def check_start(file: Path) -> None:
    """Refuse an empty file, and text in another encoding, which would be read as other letters without a word."""
    with open(file, "rb") as content:
        start = content.read(START)
    if not start.strip():
        raise ValueError(f"{file} is empty: there is nothing to train on.")
    if BUILDERS[file.suffix] == "parquet":
        return
    try:
        # The last letter may be cut in two.
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8: byte {error.start}. {CONVERT}") from error


class Explained:
    """Turns what goes wrong while files are read into one line that names the file and its line."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception):
            return
        for file in self.files:
            reason = why_broken(file)
            if reason is not None:
                raise ValueError(f"{file}{reason}") from error
        causes = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{', '.join(map(str, self.files))} cannot be read: {causes}") from error


def why_broken(file: Path) -> str | None:
    """Find the line with which a file of JSON or CSV cannot be read.

    Args:
        file: The file.

    Returns:
        What to put behind its name; None where nothing is found.
    """
    reader = {"json": _json_fault, "csv": _csv_fault}.get(BUILDERS[file.suffix])
    if reader is None:
        return None
    try:
        return reader(file)
    except UnicodeDecodeError as error:
        return f" is not in UTF-8: byte {error.start}. {CONVERT}"


def _json_fault(file: Path) -> str | None:
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # one object per line
                return f", line {error.lineno}: {error.msg}."
        else:
            return None if isinstance(rows, (list, dict)) else f" holds {shown(rows)}, not a list of objects."
    kinds: dict[str, tuple[str, int]] = {}
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            return f", line {number} is no JSON ({getattr(error, 'msg', error)}): {shown(line.strip())}"
        if not isinstance(row, dict):
            return f", line {number} holds {shown(row)}, not an object as {EXAMPLE}"
        for key, value in row.items():
            kind = _kind(value)
            first, where = kinds.setdefault(key, (kind, number)) if kind else (kind, number)
            if kind and kind != first:
                return f", line {number}: {key!r} is {kind}, but {first} in line {where}. Give all rows the same kind."
    return None


def _kind(value: Any) -> str:
    if value is None:
        return ""
    kinds = {str: "text", bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _csv_fault(file: Path) -> str | None:
    with open(file, encoding="utf-8", newline="") as content:
        reader = csv.reader(content, delimiter="\t" if file.suffix == ".tsv" else ",")
        header = next(reader, [])
        for row in reader:
            if len(row) > len(header):
                return f", line {reader.line_num} has {len(row)} fields, but the header names {len(header)}."
    return None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with open(file, encoding="utf-8") as content:
        for number, line in enumerate(content, start=1):
            if line.strip():
                yield number, line
