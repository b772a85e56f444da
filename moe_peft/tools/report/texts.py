"""Texts of files, as batches of their groups: JSON lines with messages, text, or prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...forward.find import find_trackers
from ...messages import shown
from .observe import Batch, base_model, needs_decoder_input

# What a row may hold, the first that it has counts; the second column follows the first.
COLUMNS = (("messages",), ("text",), ("prompt", "completion"), ("prompt", "chosen"), ("chosen",), ("prompt",))
EXAMPLE = '{"text": "..."}'


@dataclass(frozen=True)
class Text:
    """A sample.

    Attributes:
        parts: What is read, and what follows it: one text or two.
        group: Its group.
        value: What the column of groups holds; None without one.
    """

    parts: tuple[str, ...]
    group: str
    value: Any = None


def read_texts(
    files: Sequence[str | Path], tokenizer: Any, *, group_column: str | None = None, max_rows: int | None = None
) -> dict[str, list[Text]]:
    """Read files of JSON lines, or a list of objects.

    Args:
        files: Paths.
        tokenizer: Of the model; its chat template writes conversations.
        group_column: Column with the group of each row; None takes each file for a group.
        max_rows: Rows of each group, the first ones; None takes all.

    Returns:
        Name of a group -> its samples.

    Raises:
        ValueError: There is no such file, a line is broken, or a row has nothing to read or no group; the line is
            named.
    """
    if not files:
        raise ValueError("There is no file of texts. Name one or more files of JSON lines.")
    if max_rows is not None and (type(max_rows) is not int or max_rows < 1):
        raise ValueError(f"max_rows={shown(max_rows)} must be a whole number of at least 1, or None for all rows.")
    paths = [Path(file) for file in files]
    stems = [path.stem for path in paths]
    groups: dict[str, list[Text]] = {}
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        for number, row in _rows(path):
            where = f"{path}, line {number}"
            value = _group(row, group_column, where) if group_column else None
            own = groups.setdefault(name if value is None else str(value), [])
            if max_rows is None or len(own) < max_rows:
                own.append(Text(_parts(row, tokenizer, where), name if value is None else str(value), value))
    if not groups:
        raise ValueError(f"{', '.join(map(str, paths))[:200]}: there are no rows. A row looks like {EXAMPLE}.")
    return groups


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}. Name a file of JSON lines; a row looks like {EXAMPLE}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: byte {error.start}. Convert it to UTF-8.") from error
    if text.lstrip().startswith("["):
        lines: Iterable[tuple[int, Any]] = enumerate(_parsed(text, f"{path}"), start=1)
    else:
        written = ((n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip())
        lines = ((n, _parsed(line, f"{path}, line {n}")) for n, line in written)
    for number, row in lines:
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}, line {number} holds {shown(row)}, not an object such as {EXAMPLE}.")
        yield number, row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise ValueError(f"{where} is no JSON ({reason}): {shown(text.strip())}") from error


def _group(row: Mapping[str, Any], column: str, where: str) -> Any:
    value = row.get(column)
    if not isinstance(value, (str, int)):
        raise ValueError(
            f"{where} has no group: its column {shown(column)} holds {shown(value)}. The row has the columns "
            f"{shown(sorted(row))}; write the group's name or number there, or name another column."
        )
    return value


def _parts(row: Mapping[str, Any], tokenizer: Any, where: str) -> tuple[str, ...]:
    columns = next((own for own in COLUMNS if all(row.get(column) is not None for column in own)), None)
    if columns is None:
        raise ValueError(
            f"{where} has the columns {shown(sorted(row))}, but needs messages, text, or prompt (with completion or "
            f"chosen). A row looks like {EXAMPLE}."
        )
    return tuple(_text(row[column], tokenizer, f"{where}, {column}") for column in columns)


def _text(value: Any, tokenizer: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(m, Mapping) and "role" in m for m in value):
        raise ValueError(f"{where} holds {shown(value)}, which is neither a text nor a list of messages.")
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template([dict(message) for message in value], tokenize=False)
    return "\n".join(str(message.get("content") or "") for message in value)


def make_batches(
    groups: Mapping[str, Sequence[Text]],
    tokenizer: Any,
    model: nn.Module,
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> dict[str, list[Batch]]:
    """Turn texts into batches, padded on the right.

    Args:
        groups: Of `read_texts`.
        tokenizer: Of the model.
        model: The model, which says whether it has a decoder that reads tokens of its own, and whether an adapter
            reads the group of each sample.
        batch_size: Rows of a batch.
        max_length: Tokens of a row; what is longer is cut.

    Returns:
        Name of a group -> batches; texts without a token are left out.
    """
    made: dict[str, list[Batch]] = {}
    columns = {column for tracker in find_trackers(model) for column in tracker.group_columns}
    two = needs_decoder_input(model)
    for group, texts in groups.items():
        rows = []
        for text in texts:
            first, *rest = (tokenizer(part)["input_ids"] for part in (text.parts if two else ["".join(text.parts)]))
            if first:
                rows.append((list(first)[:max_length], list(rest[0] if rest else first)[:max_length], text.value))
        own: list[Batch] = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch: dict[str, Any] = padded([row[0] for row in part], tokenizer)
            if two:
                starts = _decoder_start(model)
                batch["decoder_input_ids"] = padded([[starts, *row[1][:-1]] for row in part], tokenizer)["input_ids"]
            for column in columns if isinstance(part[0][2], int) else ():
                batch[column] = torch.tensor([row[2] for row in part])
            own.append(batch)
        made[group] = own
    return made


def padded(rows: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Token ids and mask of rows, padded on the right.

    Args:
        rows: Token ids of each.
        tokenizer: Its padding token is taken, where it has one.
    """
    width = max(map(len, rows))
    filler = next((own for own in (tokenizer.pad_token_id, tokenizer.eos_token_id) if own is not None), 0)
    ids = [[*row, *[filler] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _decoder_start(model: nn.Module) -> int:
    base: Any = base_model(model)
    found = getattr(base.config, "decoder_start_token_id", None)
    return int(found if found is not None else getattr(base.config, "pad_token_id", 0) or 0)
