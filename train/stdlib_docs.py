"""Instruction pairs and plain text from the documentation of the Python standard library that is running.

Real text without a download. Every public function, class and method with a docstring gives one pair of each group:

    group 1 (knowledge): "Summary of math.asin(x, /):"  -> " Return the arc sine (measured in radians) of x."
    group 0 (task):      "Kind of math.asin(x, /):"     -> " function, required arguments"

Nothing runs except the imports. The order is sorted and the split is a hash of the qualified name, so two runs of the
same interpreter write the same bytes.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stdlib_entries import Entry, collect_entries

TASK_GROUP, KNOWLEDGE_GROUP = 0, 1

FILE_NAMES = ("pretrain.jsonl", "pretrain_test.jsonl", "train.jsonl", "test.jsonl")
HELD_OUT_PERCENT = 5


def is_held_out(name: str) -> bool:
    """Say whether a qualified name belongs to the test split (`HELD_OUT_PERCENT` of the names, by hash)."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def instruction_pairs(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Turn entries into prompt/completion rows, one of each group per entry.

    Args:
        entries: Documented objects.

    Returns:
        Rows `{"prompt": str, "completion": str, "task_type": int}`; both texts are one line, the completion starts
        with the space that separates it from the prompt.
    """
    rows = []
    for entry in entries:
        call = f"{entry.name}{entry.signature}"
        rows.append(_row(f"Summary of {call}:", entry.sentence, KNOWLEDGE_GROUP))
        rows.append(_row(f"Kind of {call}:", f"{entry.kind}, {entry.arguments} arguments", TASK_GROUP))
    return rows


def _row(prompt: str, completion: str, group: int) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f" {completion}", "task_type": group}


def entry_texts(entries: Iterable[Entry]) -> list[str]:
    """Return one plain text per entry: name and signature, then the whole docstring."""
    return [f"{entry.name}{entry.signature}\n\n{entry.doc}\n" for entry in entries]


def pretraining_texts(entries: Iterable[Entry] | None = None) -> list[str]:
    """Return the plain text to pretrain on: help topics and the docstrings of the training split.

    Args:
        entries: Documented objects; default all of the standard library. Held-out names are left out.

    Returns:
        One text per help topic and per name.
    """
    from pydoc_data.topics import topics

    entries = collect_entries() if entries is None else entries
    training_texts = entry_texts(entry for entry in entries if not is_held_out(entry.name))
    return [topics[name] for name in sorted(topics)] + training_texts


def write_splits(output_dir: str | Path) -> dict[str, int]:
    """Write the data as JSON lines.

    Args:
        output_dir: Folder that receives `pretrain.jsonl` and `pretrain_test.jsonl` (`{"text"}`), `train.jsonl` and
            `test.jsonl` (`{"prompt", "completion", "task_type"}`). No name occurs in both splits.

    Returns:
        Number of rows by file name.
    """
    entries = collect_entries()
    held_out = [entry for entry in entries if is_held_out(entry.name)]
    training = [entry for entry in entries if not is_held_out(entry.name)]
    tables = [
        [{"text": text} for text in pretraining_texts(entries)],
        [{"text": text} for text in entry_texts(held_out)],
        instruction_pairs(training),
        instruction_pairs(held_out),
    ]
    files = dict(zip(FILE_NAMES, tables, strict=True))
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for file_name, rows in files.items():
        unfinished = output_dir / f"{file_name}.tmp"
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        unfinished.replace(output_dir / file_name)
    return {file_name: len(rows) for file_name, rows in files.items()}


def main() -> None:
    """Write the data and print how many rows each file has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=".cache/quickstart/data", help="folder for the JSON lines files")
    args = parser.parse_args()
    for file_name, num_rows in write_splits(args.output_dir).items():
        print(f"{file_name}: {num_rows} rows")


if __name__ == "__main__":
    main()
