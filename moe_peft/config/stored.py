"""Values of fields as a file of JSON holds them, and as their fields declare them again.

JSON knows no tuples, sets, enums, paths or dataclasses: they are written as lists, values, texts and objects. So a
field takes both forms, and holds the declared one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Annotated, Any, get_args, get_origin

# What is written as a list.
COLLECTIONS = (list, tuple, set, frozenset)


def stored(value: Any) -> Any:
    """A value without what JSON has no form for; everything else, and a set that stands alone, stays as it is.

    Args:
        value: Of a field.
    """
    if isinstance(value, (set, frozenset)):
        return type(value)(_inner(own) for own in value)
    return _inner(value)


def _inner(value: Any) -> Any:
    if isinstance(value, Enum):
        return value if isinstance(value, (str, int)) else _inner(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {own.name: _inner(getattr(value, own.name)) for own in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_inner(key): _inner(own) for key, own in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_inner(own) for own in value), key=str)
    if type(value) in (list, tuple):
        return type(value)(_inner(own) for own in value)
    return value


def unannotated(kind: Any) -> Any:
    """A type without what `Annotated` says about it.

    Args:
        kind: The type.
    """
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def as_declared(value: Any, kind: Any) -> Any:
    """A value that fits a declared type, in that type where JSON has none: tuple, set, enum, path or dataclass.

    Args:
        value: A value that fits.
        kind: The declared type, no union.
    """
    kind = unannotated(kind)
    origin, args = get_origin(kind) or kind, get_args(kind)
    if not isinstance(origin, type) or (not args and isinstance(value, origin)):
        return value
    if origin is tuple and isinstance(value, COLLECTIONS):
        kinds = [args[0]] * len(value) if args[1:] == (...,) else args or [Any] * len(value)
        return tuple(as_declared(own, inner) for own, inner in zip(value, kinds, strict=True))
    if origin in (set, frozenset) and isinstance(value, COLLECTIONS):
        return origin(as_declared(own, args[0]) if args else own for own in value)
    if origin is list and isinstance(value, list) and args:
        return [as_declared(own, args[0]) for own in value]
    if issubclass(origin, Mapping) and isinstance(value, dict) and args:
        return {key: as_declared(own, args[1]) for key, own in value.items()}
    if issubclass(origin, Enum) or issubclass(origin, PurePath):
        return origin(value)
    if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
        return origin(**value)
    return value
