"""Whether a configuration's values are of the types that its fields declare, and what to write where they are not."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence, Set
from enum import Enum
from functools import cache
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ..messages import shown
from .stored import COLLECTIONS, as_declared, stored, unannotated

KINDS = {int: "integer", float: "finite number", str: "string", dict: "dict", list: "list"}
LISTS = (list, set, frozenset, Sequence, MutableSequence, Collection, Iterable, Set)
MAPPINGS = (dict, Mapping, MutableMapping)
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
                types[name] = _evaluated(kind, known) if isinstance(kind, str) else kind
    return types


def _evaluated(kind: str, known: dict[str, Any]) -> Any:
    """A type that is written as text; Any where it names what its module does not know."""
    try:
        return eval(kind, known)
    except NameError:
        return Any


def wrong_types(config: Any) -> Iterator[tuple[str, str]]:
    """Go through the fields of a dataclass whose values are of another type.

    Args:
        config: Instance of the dataclass.

    Yields:
        Name of the field, and what its value must be.
    """
    types = field_types(type(config))  # type: ignore[arg-type]  # mypy holds classes for unhashable
    for own in dataclasses.fields(config):
        value = getattr(config, own.name)
        hint = expected(own.name, value, types[own.name], own.default)
        if hint is None and not _is_json(sorted(kept, key=str) if isinstance(kept := stored(value), set) else kept):
            hint = "a value that adapter_config.json can hold: numbers, texts, lists and mappings of them"
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
    """Whether a value is of a type, or JSON's form of one; an integer is a number too, a bool neither, Any is JSON."""
    kind = unannotated(kind)
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return _is_json(value)
    if _is_union(kind):
        return any(fits(value, own) for own in args)
    if origin is Literal:
        return any(type(value) is type(own) and value == own for own in args)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and _fits_tuple(value, args)
    if origin in MAPPINGS:
        return isinstance(value, Mapping) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if origin in LISTS:
        return isinstance(value, COLLECTIONS) and all(fits(entry, args[0]) for entry in value)
    return _is_of(value, kind)


def _fits_tuple(value: list | tuple, kinds: tuple[Any, ...]) -> bool:
    if kinds[1:] == (...,):
        return all(fits(own, kinds[0]) for own in value)
    return len(value) == len(kinds) and all(fits(own, kind) for own, kind in zip(value, kinds, strict=True))


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of a type without arguments, or JSON's form of one."""
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and _is_finite(value)
    if kind is int:
        return isinstance(value, int) and abs(value) < INTEGER_LIMIT
    if not isinstance(kind, type):  # a type that nothing here knows
        return _is_json(stored(value))
    if isinstance(value, kind):
        return True
    if issubclass(kind, Enum):
        return any(type(value) is type(own.value) and value == own.value for own in kind)
    if kind in (tuple, set, frozenset):
        return isinstance(value, COLLECTIONS)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        types = field_types(kind)
        return all(name in types and fits(own, types[name]) for name, own in value.items())
    return issubclass(kind, PurePath) and isinstance(value, str)


def declared(value: object, kind: Any) -> Any:
    """A value as its field declares it; as it is where it does not fit, or a member of a union takes it so.

    Args:
        value: Of the field.
        kind: The declared type.
    """
    kinds = get_args(kind) if _is_union(kind) else (kind,)
    fitting = next((own for own in kinds if fits(value, own)), None)
    try:
        return value if fitting is None else as_declared(value, fitting)
    except (TypeError, ValueError):  # of a dataclass whose own checks refuse it
        return value


def describe_type(kind: Any, several: bool = False) -> str:
    """A type in words, in the plural where several values have it."""
    if kind is Any:
        return "values of JSON" if several else "a value of JSON"
    if _is_union(kind):
        # A string enum is a string to who writes one.
        kinds = [own for own in get_args(kind) if not (issubclass_of_str(own) and str in get_args(kind))]
        *first, last = [describe_type(own, several) for own in kinds]
        return f"{', '.join(first)} or {last}" if first else last
    kind = unannotated(kind)
    if kind is NoneType:
        return "None"
    if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        choices = get_args(kind) or [own.value for own in kind]
        return f"{'some' if several else 'one'} of {', '.join(map(shown, choices))}"
    if get_origin(kind) is tuple:
        entries = [describe_type(own) for own in get_args(kind) if own is not ...]
        return f"{'lists' if several else 'a list'} of {', '.join(entries)}{', ...' if ... in get_args(kind) else ''}"
    if kind is bool:
        return "True or False"
    if get_origin(kind) in LISTS:
        return f"{'lists' if several else 'a list'} of {describe_type(get_args(kind)[0], several=True)}"
    if get_origin(kind) in MAPPINGS:
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
