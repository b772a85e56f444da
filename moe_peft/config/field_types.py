"""Whether a configuration's values are of the types that its fields declare, and what to write where they are not."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from ..messages import shown

KINDS = {int: "integer", float: "finite number", str: "string", dict: "dict", list: "list"}
# What tensors and files take for an integer, and longer texts are no misspelt numbers.
INTEGER_LIMIT = 2**63
TEXT_LIMIT = 200


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, each evaluated in the module that declares it.

    `typing.get_type_hints` evaluates the other annotations of a class too, and on Python 3.10 refuses some of them.

    Args:
        cls: The dataclass.
    """
    names = {own.name for own in dataclasses.fields(cls)}
    types: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, kind in inspect.get_annotations(base).items():
            if name in names:
                known = getattr(sys.modules.get(base.__module__), "__dict__", {})
                types[name] = eval(kind, known) if isinstance(kind, str) else kind
    return types


def wrong_types(config: Any) -> Iterator[tuple[str, str]]:
    """Go through the fields of a dataclass whose values are of another type.

    Args:
        config: Instance of the dataclass.

    Yields:
        Name of the field, and what its value must be.
    """
    types = field_types(type(config))  # type: ignore[arg-type]  # mypy holds classes for unhashable
    for own in dataclasses.fields(config):
        hint = expected(own.name, getattr(config, own.name), types[own.name], own.default)
        if hint is not None:
            yield own.name, hint


def expected(name: str, value: object, kind: Any, default: object) -> str | None:
    """Say what a value must be.

    Args:
        name: Name of the field.
        value: Its value.
        kind: Its declared type: bool, int, float, str, None and Any, lists and dicts of them, and unions.
        default: Its default, the example where the value tells of none.

    Returns:
        What it must be, and what to write instead; None where it is of the type.
    """
    if fits(value, kind):
        return None
    meant = [candidate for candidate in _readings(value) if fits(candidate, kind)]
    if meant:
        return f"{describe_type(kind)}; write {name}={shown(meant[0])}"
    size = ", below 2**63" if isinstance(value, int) and abs(value) >= INTEGER_LIMIT else ""
    example = "" if default is None or not fits(default, kind) else f", as in {name}={shown(default)}"
    return f"{describe_type(kind)}{size}{example}"


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a type; an integer is a number too, a bool is neither, and Any is any value of JSON."""
    if kind is Any:
        return _is_json(value)
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
        return isinstance(value, (int, float)) and _is_finite(value)
    if kind is int:
        return isinstance(value, int) and abs(value) < INTEGER_LIMIT
    return isinstance(value, kind)


def describe_type(kind: Any, several: bool = False) -> str:
    """A type in words, in the plural where several values have it."""
    if kind is Any:
        return "values of JSON" if several else "a value of JSON"
    if _is_union(kind):
        # A string enum is a string to who writes one.
        kinds = [own for own in get_args(kind) if not (issubclass_of_str(own) and str in get_args(kind))]
        *first, last = [describe_type(own, several) for own in kinds]
        return f"{', '.join(first)} or {last}" if first else last
    if kind is NoneType:
        return "None"
    if kind is bool:
        return "True or False"
    if get_origin(kind) is list:
        return f"{'lists' if several else 'a list'} of {describe_type(get_args(kind)[0], several=True)}"
    if get_origin(kind) is dict:
        inner = " to ".join(describe_type(own, several=True) for own in get_args(kind))
        return f"{'dicts' if several else 'a dict'} from {inner}"
    word = KINDS.get(kind, getattr(kind, "__name__", str(kind)))
    return f"{word}s" if several else f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def issubclass_of_str(kind: Any) -> bool:
    """Whether a type is a class of strings other than `str` itself."""
    return isinstance(kind, type) and issubclass(kind, str) and kind is not str


def _is_json(value: object, depth: int = 16) -> bool:
    """Whether a file can hold a value, not nested beyond a depth."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(_is_json(own, depth - 1) for own in value)
    if isinstance(value, Mapping):
        return depth > 0 and all(isinstance(key, str) and _is_json(own, depth - 1) for key, own in value.items())
    return value is None or any(fits(value, kind) for kind in (bool, int, float, str))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest number
        return False


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _readings(value: object) -> list[Any]:
    """What a value of another type may have been meant as, likeliest first."""
    if isinstance(value, str):
        if len(value) > TEXT_LIMIT:
            return []
        try:
            parsed = json.loads(value.lower().replace("none", "null"))
        except (ValueError, RecursionError):
            return [[value]]
        return [parsed, [parsed], [value]]
    if isinstance(value, float) and value.is_integer():
        return [int(value), [int(value)]]
    if isinstance(value, int) and not isinstance(value, bool):
        return [*([bool(value)] if value in (0, 1) else []), [value]]
    return []
