"""What the source of a module's forward says, for questions that no name and no shape answers."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType


def functions_of(cls: type) -> Iterator[FunctionType]:
    """The forward of a class, its methods that this leads to, and functions of its file that they call.

    Args:
        cls: Class of a module.
    """
    seen: set[FunctionType] = set()
    todo = [getattr(cls, "forward", None)]
    while todo:
        method = todo.pop()
        function = inspect.unwrap(method) if callable(method) else None
        if function in seen or not isinstance(function, FunctionType):
            continue
        seen.add(function)
        yield function
        for name in names_in(function.__code__):
            beside = function.__globals__.get(name)
            if isinstance(inspect.getattr_static(cls, name, None), FunctionType):
                todo.append(getattr(cls, name))
            elif isinstance(beside, FunctionType) and beside.__module__ == function.__module__:
                todo.append(beside)


def names_in(code: CodeType) -> set[str]:
    """Names that a function, or one inside it, looks up.

    Args:
        code: Its code.
    """
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return names


def definition_of(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax of a function with at least one argument; None for one without source.

    Args:
        function: Any.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return None
    definition = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    return definition if definition is not None and definition.args.args else None


def attribute_path(node: ast.expr, own: str) -> str | None:
    """`a.b` for the expression `self.a.b`; None for any other.

    Args:
        node: The expression.
        own: What the source calls the module.
    """
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if parts and isinstance(node, ast.Name) and node.id == own else None
