"""Puts a model back as it was where an operation on it fails: modules, hooks, parameters, flags, configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module, *others: object) -> Iterator[None]:
    """Undo what the block did to a model when it raises, an interruption included.

    Restored are the attributes of every module, and what their dictionaries, lists and sets held: submodules,
    parameters (the objects, not their values), hooks, flags, registered adapters. Values that were written into a
    parameter in place are not.

    Args:
        model: The model.
        *others: Further objects whose attributes are restored, such as a configuration that is filled in.
    """
    modules = list(model.modules())
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    states = [_State(owner) for owner in (*modules, *others) if hasattr(owner, "__dict__")]
    try:
        yield
    except BaseException:
        for state in states:
            state.restore()
        for parameter, requires_grad in trainable:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad
        raise


def restorer(*owners: object) -> Callable[[], None]:
    """Remember the attributes of objects, and what those that are containers hold.

    Args:
        *owners: The objects; those without attributes are left out.

    Returns:
        Function that puts everything back.
    """
    states = [_State(owner) for owner in owners if hasattr(owner, "__dict__")]

    def restore() -> None:
        for state in states:
            state.restore()

    return restore


class _State:
    """The attributes of one object, and the contents of those that are containers."""

    def __init__(self, owner: Any) -> None:
        self.attributes: dict[str, Any] = owner.__dict__
        self.values = dict(self.attributes)
        containers = (value for value in self.values.values() if isinstance(value, (dict, list, set)))
        self.contents = [(container, _content(container)) for container in containers]

    def restore(self) -> None:
        """Change what differs alone, as another thread may be using the rest."""
        for name in self.attributes.keys() - self.values.keys():
            del self.attributes[name]
        for name, value in self.values.items():
            if self.attributes.get(name, self) is not value:
                self.attributes[name] = value
        for container, content in self.contents:
            if not _same(_content(container), content):
                container.clear()
                container.update(content) if isinstance(container, (dict, set)) else container.extend(content)


def _content(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _same(found: list[Any], content: list[Any]) -> bool:
    """Whether two contents hold the same objects in the same order, which need not be comparable."""
    if len(found) != len(content):
        return False
    return all(
        a is b or (type(a) is type(b) is tuple and len(a) == len(b) and all(map(is_, a, b)))
        for a, b in zip(found, content, strict=True)
    )
