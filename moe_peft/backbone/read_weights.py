"""Modules whose weight a backbone reads instead of calling them: what an adapter adds there would be left out.

Mamba computes with `self.dt_proj.weight`, its fused kernels are handed the weights of further projections in training,
and `torch.nn.MultiheadAttention` reads that of `out_proj`. No name tells, so the source of `forward`, and of the
methods that it calls, is looked at: a tensor `self.<module>.weight` that is computed with or passed on is one that is
read; its dtype, device or shape is not. Branches that the module's own settings rule out do not count.
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .source import attribute_path, definition_of, functions_of, names_in

# What is asked of a weight without computing with it: attributes, and functions and methods that it is given to.
METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "is_cuda", "size", "dim", "numel", "stride"}
    | {"element_size", "data_ptr", "is_floating_point", "is_contiguous", "is_quantized", "itemsize", "grad"}
)
ASKING = frozenset({"isinstance", "hasattr", "getattr", "type", "id", "to", "type_as", "len"})
# A setting that changes while a model is in use.
CHANGING = frozenset({"training"})
UNKNOWN = object()
COMPARISONS: dict[type[ast.cmpop], Callable[..., bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@dataclass(frozen=True)
class Condition:
    """A test that has to come out as given for a place in the source to be reached.

    Attributes:
        test: The expression.
        wanted: Its outcome.
        absent: Arguments that count as None, as in most calls; where they are given, the module is read, and called
            where they are not.
    """

    test: ast.expr
    wanted: bool
    absent: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Use:
    """A place in the source where a module is used.

    Attributes:
        path: Attributes that lead to the module, joined by dots.
        own: The name of the method's first argument.
        conditions: What has to hold for the place to be reached.
    """

    path: str
    own: str
    conditions: tuple[Condition, ...]

    def may_happen(self, module: nn.Module) -> bool:
        """Whether the settings of a module leave the place within reach."""
        return not any(
            evaluate(condition.test, module, self.own, condition.absent) is (not condition.wanted)
            for condition in self.conditions
        )


def read_weights(model: nn.Module) -> dict[str, str]:
    """Modules whose weight another module reads in a forward pass.

    Args:
        model: Any model, with or without adapters, also one on the meta device. Nothing is run.

    Returns:
        Full name of the module -> class name of the one that reads it. Code without source says nothing.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        for read in _reads(type(module)):  # type: ignore[arg-type]
            if read.may_happen(module):
                found[f"{name}.{read.path}".lstrip(".")] = type(module).__name__
    return found


@lru_cache(maxsize=1024)
def _reads(cls: type) -> tuple[Use, ...]:
    """Every place in `forward`, and in what it leads to, where a weight is read."""
    return tuple(
        read
        for function in functions_of(cls)
        if "weight" in names_in(function.__code__)
        for read in _reads_of(function)
    )


def _reads_of(function: FunctionType) -> list[Use]:
    definition = definition_of(function)
    if definition is None:
        return []
    own = definition.args.args[0].arg
    parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
    reads = []
    for node in ast.walk(definition):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            module = attribute_path(node.value, own)
            if module is not None and _computes(node, parents):
                reads.append(Use(module, own, tuple(conditions_of(node, parents, module, definition))))
    return reads


def _computes(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether the values of a weight are used, and not only what kind of tensor it is."""
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr not in METADATA
    if isinstance(parent, ast.Call) and parent.func is not node:
        name = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
        return name not in ASKING
    return not (isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops))


def conditions_of(
    node: ast.AST, parents: dict[ast.AST, ast.AST], path: str, function: ast.FunctionDef
) -> Iterator[Condition]:
    """The tests around an expression, and those before it that would have left the function.

    Args:
        node: The expression.
        parents: Every node of the function -> the one around it.
        path: Path of the module that the expression uses.
        function: The function.
    """
    own, absent = function.args.args[0].arg, _none_by_default(function)
    while node is not function:
        parent = parents[node]
        if isinstance(parent, (ast.If, ast.IfExp)) and node is not parent.test:
            body, other = _branches(parent)
            wanted = node in body
            called = _calls(other if wanted else body, path, own)
            yield Condition(parent.test, wanted, absent if called else frozenset())
        for block in (getattr(parent, "body", None), getattr(parent, "orelse", None)):
            if isinstance(block, list) and node in block:
                for before in block[: block.index(node)]:
                    if isinstance(before, ast.If) and isinstance(before.body[-1], (ast.Return, ast.Raise)):
                        called = _calls(before.body, path, own)
                        yield Condition(before.test, False, absent if called else frozenset())
        node = parent


def _branches(node: ast.If | ast.IfExp) -> tuple[list[ast.AST], list[ast.AST]]:
    if isinstance(node, ast.If):
        return list(node.body), list(node.orelse)
    return [node.body], [node.orelse]


def _calls(nodes: Sequence[ast.AST], path: str, own: str) -> bool:
    """Whether statements call the module at the end of a path."""
    inside = (inner for node in nodes for inner in ast.walk(node))
    return any(isinstance(inner, ast.Call) and attribute_path(inner.func, own) == path for inner in inside)


def _none_by_default(function: ast.FunctionDef) -> frozenset[str]:
    arguments, defaults = function.args.args, function.args.defaults
    pairs = zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
    return frozenset(name.arg for name, value in pairs if isinstance(value, ast.Constant) and value.value is None)


def evaluate(node: ast.expr, module: nn.Module, own: str, absent: frozenset[str]) -> object:
    """What a test comes out as where it asks settings of a module only.

    Args:
        node: The test.
        module: Whose settings are asked.
        own: What the source calls the module.
        absent: Names that count as None.

    Returns:
        Its value; `UNKNOWN` where it asks anything else.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return None if node.id in absent else UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = evaluate(node.operand, module, own, absent)
        return value if value is UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        return _both_or_either(node, module, own, absent)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        sides = [evaluate(side, module, own, absent) for side in (node.left, node.comparators[0])]
        try:
            return UNKNOWN if UNKNOWN in sides else COMPARISONS[type(node.ops[0])](*sides)
        except TypeError:
            return UNKNOWN
    return _setting(module, attribute_path(node, own))


def _both_or_either(node: ast.BoolOp, module: nn.Module, own: str, absent: frozenset[str]) -> object:
    settles = isinstance(node.op, ast.Or)  # one true value settles `or`, one false value `and`
    values = [evaluate(value, module, own, absent) for value in node.values]
    if any(value is not UNKNOWN and bool(value) is settles for value in values):
        return settles
    return UNKNOWN if UNKNOWN in values else not settles


def _setting(module: nn.Module, path: str | None) -> object:
    """A number, text or None that a module or its configuration holds."""
    value: object = module
    for name in path.split(".") if path else ["training"]:
        if name in CHANGING or isinstance(inspect.getattr_static(type(value), name, None), property):
            return UNKNOWN
        value = getattr(value, name, UNKNOWN)
    return value if value is None or isinstance(value, (bool, int, float, str)) else UNKNOWN
