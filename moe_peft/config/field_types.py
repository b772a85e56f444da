"""Whether a configuration's values are of the types that its fields declare, and what to write where they are not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Container, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

KINDS = {int: "integer", float: "finite number", str: "string"}


def wrong_types(config: Any, skipped: Container[str]) -> Iterator[tuple[str, str]]:
    """Go through the fields of a dataclass whose values are of another type.

    Args:
        config: Instance of the dataclass.
        skipped: Names of fields that are not looked at.

    Yields:
        Name of the field, and what its value must be.
    """
    types = get_type_hints(type(config))
    for own in dataclasses.fields(config):
        if own.name not in skipped:
            kind = types[own.name]
            hint = expected(own.name, getattr(config, own.name), kind, own.default)
            if hint is not None:
                yield own.name, hint


def expected(name: str, value: object, kind: Any, default: object) -> str | None:
    """Say what a value must be.

    Args:
        name: Name of the field.
        value: Its value.
        kind: Its declared type: bool, int, float, str and None, lists and dicts of them, and unions.
        default: Its default, the example where the value tells of none.

    Returns:
        What it must be, and what to write instead; None where it is of the type.
    """
    if fits(value, kind):
        return None
    meant = [candidate for candidate in _readings(value) if fits(candidate, kind)]
    if meant:
        return f"{describe_type(kind)}; write {name}={meant[0]!r}"
    example = "" if default is None or not fits(default, kind) else f", as in {name}={default!r}"
    return f"{describe_type(kind)}{example}"


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a type; an integer is a number too, a bool is neither."""
    if _is_union(kind):
        return any(fits(value, own) for own in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple, set)) and all(fits(entry, get_args(kind)[0]) for entry in value)
    if get_origin(kind) is dict:
        key_kind, value_kind = get_args(kind)
        return isinstance(value, Mapping) and all(fits(k, key_kind) and fits(v, value_kind) for k, v in value.items())
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def describe_type(kind: Any, several: bool = False) -> str:
    """A type in words, in the plural where several values have it."""
    if _is_union(kind):
        *first, last = [describe_type(own) for own in get_args(kind)]
        return f"{', '.join(first)} or {last}"
    if kind is NoneType:
        return "None"
    if kind is bool:
        return "True or False"
    if get_origin(kind) is list:
        return f"{'lists' if several else 'a list'} of {describe_type(get_args(kind)[0], several=True)}"
    if get_origin(kind) is dict:
        return f"a dict from {' to '.join(describe_type(own, several=True) for own in get_args(kind))}"
    word = KINDS[kind]
    return f"{word}s" if several else f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _readings(value: object) -> list[Any]:
    """What a value of another type may have been meant as, likeliest first."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value.lower().replace("none", "null"))
        except ValueError:
            return [[value]]
        return [parsed, [parsed], [value]]
    if isinstance(value, float) and value.is_integer():
        return [int(value), [int(value)]]
    if isinstance(value, int) and not isinstance(value, bool):
        return [*([bool(value)] if value in (0, 1) else []), [value]]
    return []
