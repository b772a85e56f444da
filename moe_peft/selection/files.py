"""What scores and selections are read from: JSON objects, layers as decimal keys, ids as whole numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..messages import shown

# No backbone has a layer or an expert of more digits.
MAX_DIGITS = 9
MAX_EXPERTS = 2**20


def read_object(path: str | Path, what: str) -> dict[str, Any]:
    """Read a file that holds one JSON object, without a key that is written twice.

    Args:
        path: The file.
        what: What it should hold, for the message.

    Raises:
        ValueError: The file holds something else.
        FileNotFoundError: There is none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no {what}: it cannot be read as JSON ({shown(str(error))}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no {what}: it holds {shown(content)}, not an object.")
    return content


def layer_index(key: object) -> int | None:
    """Index of the layer that a key names, a number or its decimal digits; None where it names none."""
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= MAX_DIGITS:
        return int(key)
    return key if is_whole(key) else None  # type: ignore[return-value]


def is_whole(value: object, least: int = 0) -> bool:
    """Whether a value is a whole number of a size that indices and counts have, and no bool."""
    return type(value) is int and least <= value < 10**MAX_DIGITS


def wrong_experts(experts: Mapping[Any, Any], sizes: Mapping[Any, int] | None = None) -> str | None:
    """Why a mapping is no selection of experts by layer.

    Args:
        experts: Layer -> ids.
        sizes: Layer -> E, where it is known.

    Returns:
        The reason; None where it is one.
    """
    layers = [layer_index(key) for key in experts]
    for key, layer in zip(experts, layers, strict=True):
        if layer is None:
            return f"{shown(key)} is no layer"
        ids = experts[key]
        if not isinstance(ids, (list, tuple, set, range)) or not _are_different_ids(ids):
            return f"a layer's experts are a list of different expert ids, which {shown(key)}: {shown(ids)} is not"
        size = (sizes or {}).get(key)
        foreign = None if size is None else next((expert for expert in ids if expert >= size), None)
        if foreign is not None:
            return f"layer {shown(key)} has the experts 0 to {size - 1}, and {foreign} is none of them"  # type: ignore[operator]
    return None if len(set(layers)) == len(layers) else "a layer is named twice"


def _are_different_ids(ids: Iterable[Any]) -> bool:
    if isinstance(ids, range) and not (is_whole(ids.start) and is_whole(ids.stop) and len(ids) <= MAX_EXPERTS):
        return False
    ids = list(ids)
    return all(map(is_whole, ids)) and len(set(ids)) == len(ids)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} is written twice")
    return found
