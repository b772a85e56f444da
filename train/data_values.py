"""Whether rows hold what a trainer reads in their columns: texts, conversations, and truth values.

The form of the first row is that of all, as a column has one type; what a row may still lack is looked for in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_peft.messages import shown

TALKS = ("messages",)  # columns that hold conversations alone
EITHER = ("prompt", "completion", "chosen", "rejected")  # texts or conversations, all of a row alike
TRUTH = ("label",)
MESSAGE = '{"role": "user", "content": "Hi"}'
# Keys of messages as other programs write them, and the roles of theirs.
OTHERS = {"from": "role", "value": "content", "human": "user", "gpt": "assistant"}
BATCH = 1000


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def check_values(rows: Any, columns: Sequence[str], name: str) -> None:
    """Refuse values that a trainer stops at, or learns nothing from.

    Args:
        rows: A `Dataset`, or a streamed one, of which the first row is looked at.
        columns: Those that the trainer reads.
        name: Where the rows are from, for the message.

    Raises:
        ValueError: A value is of another form, a message lacks something, or no row holds a text to learn.
    """
    learned = [column for column in columns if column not in (*TRUTH, "prompt")] or list(columns)
    blank = True
    for number, row in enumerate(_in_order(rows, columns), start=1):
        fault = fault_of(row, columns)
        if fault is not None:
            raise ValueError(f"{name}, row {number}: {fault}")
        blank = blank and all(isinstance(row[column], str) and not row[column].strip() for column in learned)
    if blank:
        raise ValueError(f"{name}: every {' and '.join(learned)} is blank, so there is nothing to learn.")


def fault_of(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """What is wrong with a row.

    Args:
        row: Column -> value.
        columns: Those that the trainer reads.

    Returns:
        What to put behind its number; None where it is right.
    """
    own = [column for column in EITHER if column in columns]
    talks = [column for column in own if isinstance(row[column], list)]
    if talks and len(talks) < len(own):
        text = next(column for column in own if column not in talks)
        return (
            f"{talks[0]!r} is a conversation, but {text!r} is {shown(row[text])}. Write all of {', '.join(own)} as "
            f"texts, or all as lists of messages as [{MESSAGE}]."
        )
    for column in columns:
        value = row[column]
        if column in TRUTH:
            if not isinstance(value, bool) and value not in (0, 1):
                return f"{column!r} is {shown(value)}. Write true for a wanted completion, and false for another."
        elif column in TALKS or column in talks:
            fault = _fault_of_talk(value)
            if fault is not None:
                return f"{column!r} {fault}"
        elif not isinstance(value, str):
            return f"{column!r} is {shown(value)}, which is no text. Write it in quotes."
    return None


def _fault_of_talk(value: Any) -> str | None:
    """What is wrong with a conversation, behind the name of its column."""
    if not isinstance(value, list) or not value:
        return f"is {shown(value)}, but must be a list of messages as [{MESSAGE}]."
    for message in value:
        if not isinstance(message, Mapping):
            return f"holds {shown(message)}, but a message looks like {MESSAGE}."
        held = {key: own for key, own in message.items() if own is not None}
        missing = [key for key in ("role", "content") if key not in held]
        if missing == ["content"] and held.get("tool_calls"):
            continue
        if missing:
            renamed = [f"{own!r} to {OTHERS[own]!r}" for own in (*held, *_texts(held)) if own in OTHERS]
            hint = f" Rename {', '.join(renamed)}." if renamed else ""
            return f"holds a message without {' and '.join(missing)}: {shown(held)}. It looks like {MESSAGE}.{hint}"
    return None


def _texts(message: Mapping[str, Any]) -> Iterable[str]:
    return (own for own in message.values() if isinstance(own, str))


def _in_order(rows: Any, columns: Sequence[str]) -> Iterable[dict[str, Any]]:
    """Rows with some columns; the first alone of streamed ones."""
    if not hasattr(rows, "__len__"):
        yield {column: next(iter(rows)).get(column) for column in columns}
        return
    chosen = rows.select_columns(list(columns)).with_format(None)
    for start in range(0, len(rows), BATCH):
        batch = chosen[start : start + BATCH]
        yield from (dict(zip(batch, own, strict=True)) for own in zip(*batch.values(), strict=True))
