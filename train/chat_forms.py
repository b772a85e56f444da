"""Conversations as ShareGPT writes them, with `from` and `value`, become the messages that chat templates read.

TRL renames the keys by itself and keeps the names of the speakers, which templates then write as they are: a model
would learn to answer as "gpt".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MESSAGES, CONVERSATIONS = "messages", "conversations"
# Speakers there -> roles of chat templates; all others have the same name.
ROLES = {"human": "user", "gpt": "assistant"}
KEYS = {"from": "role", "value": "content"}


def as_messages(rows: Any) -> Any:
    """Rows whose conversations stand in `messages`, as roles and contents.

    Args:
        rows: A `Dataset`, or a streamed one.

    Returns:
        The same rows where they hold no such conversations.
    """
    columns = rows.column_names or []
    column = next((name for name in (MESSAGES, CONVERSATIONS) if name in columns), None)
    first = next(iter(rows), None) if column else None
    if column is None or first is None or not _is_talk(first[column]):
        return rows
    if column == MESSAGES and not KEYS.keys() & first[column][0].keys():
        return rows
    return rows.map(message_row, fn_kwargs={"column": column}, remove_columns=[column])


def message_row(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    """The column `messages` of a row.

    Args:
        row: Column -> value.
        column: Where its conversation stands.
    """
    turns = row[column] if isinstance(row[column], list) else []
    return {MESSAGES: [_message(turn) if isinstance(turn, Mapping) else turn for turn in turns]}


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    named = {KEYS.get(key, key): value for key, value in turn.items()}
    role = named.get("role")
    return {**named, "role": ROLES.get(role, role) if isinstance(role, str) else role}


def _is_talk(value: Any) -> bool:
    """Whether a value is a list of turns in either form."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    return {"from", "value"} <= value[0].keys() or {"role", "content"} <= value[0].keys()
