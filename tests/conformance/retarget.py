"""Points one of peft's test classes at other rows, without changing the class or its file."""

import functools
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import pytest


def retarget(
    cls: type,
    *tables: tuple[Sequence, Sequence],
    inline: Mapping[str, Sequence] | None = None,
    keep: Sequence[str] = (),
) -> type:
    """Derive a class whose parametrized tests run over our rows.

    Args:
        cls: A test class of peft.
        *tables: (peft's table, our rows). A mark belongs to a table when it was made with the same object.
        inline: Test name -> our rows, for tests whose rows are written in their own mark.
        keep: Names of tests without rows that are run as they are.

    Returns:
        A subclass; tests that none of the arguments speaks of, which are those of single stock methods, are left out.
    """
    inline = inline or {}
    namespace: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    for name in sorted(name for name in dir(cls) if name.startswith("test")):
        test = getattr(cls, name)
        theirs = getattr(test, "pytestmark", [])
        marks = [_replace(mark, tables, inline.get(name)) for mark in theirs]
        if any(new is not old for new, old in zip(marks, theirs, strict=True)):
            namespace[name] = _with_marks(test, marks)
        elif name not in keep:
            namespace[name] = None
    unknown = [name for name in (*inline, *keep) if namespace.get(name, getattr(cls, name, None)) is None]
    assert not unknown, f"{cls.__name__} has no tests {unknown}"
    derived = type(cls.__name__, (cls,), namespace)
    left = keep or any(namespace[name] for name in namespace if name.startswith("test"))
    assert left, f"{cls.__name__}: no test is left"
    return derived


def _replace(mark: pytest.Mark, tables: Sequence[tuple[Sequence, Sequence]], inline: Sequence | None) -> pytest.Mark:
    if mark.name != "parametrize":
        return mark
    table = mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"]
    rows = next((ours for theirs, ours in tables if theirs is table), inline)
    if rows is None:
        return mark
    return pytest.mark.parametrize(mark.args[0], rows).mark


def _with_marks(test: FunctionType, marks: list[pytest.Mark]) -> FunctionType:
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    functools.update_wrapper(copy, test)
    del copy.__wrapped__
    copy.__kwdefaults__ = test.__kwdefaults__
    copy.pytestmark = marks
    return copy
