"""Fields that an adapter type goes without: files written before hold them, and their known value alone passes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any, TypeVar

from ..messages import shown

C = TypeVar("C", bound=type)
# Field name -> the value that files written before hold, and why there is no such field.
Absent = Mapping[str, tuple[Any, str]]
TARGET_PARAMETERS: Absent = {
    "target_parameters": (None, "experts are adapted as modules; name the modules in target_modules")
}


def absent(group: type, reason: str, **values: Any) -> dict[str, tuple[Any, str]]:
    """The fields of a group that an adapter type goes without.

    Args:
        group: Dataclass that declares them.
        reason: Why the type has none, for the message.
        **values: Values that files hold where they are not the group's defaults.
    """
    own = {name for name in inspect.get_annotations(group) if name in group.__dict__["__dataclass_fields__"]}
    known = {entry.name: entry.default for entry in dataclasses.fields(group)}
    return {name: (values.get(name, known[name]), reason) for name in known if name in own}


def accepts_absent(cls: C) -> C:
    """Let a configuration class be given its `absent_fields`, by files and by callers, at their known values alone.

    Args:
        cls: Dataclass with the class attribute `absent_fields`.

    Returns:
        The class; its constructor raises `ValueError` for another value, with the reason.
    """
    init = cls.__init__  # type: ignore[misc]
    absent_fields: Absent = cls.absent_fields  # type: ignore[attr-defined]

    @wraps(init)
    def without(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, (value, reason) in absent_fields.items():
            if name in kwargs and not _same(given := kwargs.pop(name), value):
                raise ValueError(f"{cls.__name__}: {name}={shown(given)} must be left at {shown(value)}: {reason}.")
        init(self, *args, **kwargs)

    cls.__init__ = without  # type: ignore[misc]
    return cls


def _same(given: object, value: object) -> bool:
    if given is None or value is None or isinstance(given, bool) or isinstance(value, bool):
        return given is value
    return type(given) in (int, float, str) and given == value
