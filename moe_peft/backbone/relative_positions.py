"""Linear layers that read embeddings of relative positions, which are no tokens: all samples share these rows.

Conformers project 2 F - 1 of them for F frames (`linear_pos`), DeBERTa twice its span, in some of its forms with the
projections of the queries and keys. The longest row of a batch, padding included, says how many there are. No name of
a layer tells and no shape does in every batch, so the source is looked at: an argument that is made of nothing but
embeddings of positions, or of a count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import FunctionType
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .read_weights import Use, conditions_of
from .source import attribute_path, definition_of, functions_of, names_in

Reader = Literal["positions", "tokens_and_positions"]

# How forwards call embeddings of positions that belong to no sample.
POSITIONS = re.compile(r"^(rel(ative)?_)?pos(ition)?_(emb|enc)|^rel(ative)?_emb")
COUNT = "arange"
# What is asked of a tensor without its values.
METADATA = frozenset({"shape", "size", "dtype", "device", "ndim"})


def position_readers(model: nn.Module) -> dict[str, Reader]:
    """Modules that are called with embeddings of relative positions.

    Args:
        model: Any model, with or without adapters. Nothing is run.

    Returns:
        Full name of the module -> "positions", or "tokens_and_positions" where other calls give it tokens. Code
        without source says nothing.
    """
    found: dict[str, Reader] = {}
    for name, module in model.named_modules():
        calls = () if isinstance(module, BaseTunerLayer) else _calls(type(module))  # type: ignore[arg-type]
        given: dict[str, set[bool]] = {}
        for use, positions in calls:
            if use.may_happen(module):
                given.setdefault(use.path, set()).add(positions)
        for path, kinds in given.items():
            if True in kinds:
                found[f"{name}.{path}".lstrip(".")] = "positions" if kinds == {True} else "tokens_and_positions"
    return found


def below_positions(model: nn.Module) -> set[str]:
    """Modules that read nothing but relative positions; what lies below them does so as well.

    Args:
        model: As for `position_readers`.
    """
    return {name for name, reader in position_readers(model).items() if reader == "positions"}


@lru_cache(maxsize=1024)
def _calls(cls: type) -> tuple[tuple[Use, bool], ...]:
    """Every call of a child that is given positions somewhere, and whether it is given them there."""
    functions = {function: names_in(function.__code__) for function in functions_of(cls)}
    suspects = {
        function
        for function, names in functions.items()
        if COUNT in names or any(POSITIONS.search(name) for name in function.__code__.co_varnames)
    }
    calls = [call for function in suspects for call in _calls_of(function)]
    read = {use.path for use, positions in calls if positions}
    leaves = {path.rpartition(".")[2] for path in read}
    others = [function for function, names in functions.items() if function not in suspects and leaves & names]
    calls += [call for function in others for call in _calls_of(function)]
    return tuple((use, positions) for use, positions in calls if use.path in read)


def _calls_of(function: FunctionType) -> Iterator[tuple[Use, bool]]:
    """The modules that a function calls, and whether it gives them positions."""
    definition = definition_of(function)
    if definition is None:
        return
    arguments = definition.args
    own = arguments.args[0].arg
    parameters = {one.arg for one in (*arguments.args[1:], *arguments.kwonlyargs)}
    assigned = _assignments(definition)
    parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(definition):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        path = attribute_path(node.func, own)
        if path is not None:
            sources = _sources(node.args[0], assigned, frozenset())
            from_outside = sources & parameters
            positions = all(POSITIONS.search(name) for name in from_outside) if from_outside else COUNT in sources
            yield Use(path, own, tuple(conditions_of(node, parents, path, definition))), positions


def _assignments(definition: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    """Local name -> all that is assigned to it."""
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(definition):
        if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr)) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part in ast.walk(target):
                if isinstance(part, ast.Name):
                    assigned.setdefault(part.id, []).append(node.value)
    return assigned


def _sources(node: ast.AST, assigned: Mapping[str, list[ast.expr]], seen: frozenset[str]) -> set[str]:
    """Names whose values an expression is made of; what is asked of shapes, dtypes and indices is none."""
    if isinstance(node, ast.Attribute) and node.attr in METADATA:
        return set()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METADATA:
        return set()
    if isinstance(node, ast.Subscript):
        return _sources(node.value, assigned, seen)
    if isinstance(node, ast.Name):
        found = {node.id}
        for value in assigned.get(node.id, []) if node.id not in seen else []:
            found |= _sources(value, assigned, seen | {node.id})
        return found
    found = {node.attr} if isinstance(node, ast.Attribute) and node.attr == COUNT else set()
    for child in ast.iter_child_nodes(node):
        found |= _sources(child, assigned, seen)
    return found
