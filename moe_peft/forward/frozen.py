"""Tensors that a part never trains are frozen when a forward begins, whoever has let all of a model train.

`model.requires_grad_(True)` and loops over `model.parameters()` reach the tensors themselves, and no method of the
layers that hold them.
"""

from __future__ import annotations

from torch import nn

from ..part import ModulePart


class FrozenTensors:
    """Knows the parts of a model that name frozen tensors, so that a forward without any asks nobody."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[nn.Module, tuple[str, ...]]]] = {}

    def forget(self) -> None:
        """Look for the parts anew, as they have changed."""
        self._parts.clear()

    def freeze(self, module: nn.Module) -> None:
        """Freeze what the parts below a module never train.

        Args:
            module: A model or a stack of one.
        """
        parts = self._parts.get(id(module))
        if parts is None:
            parts = self._parts[id(module)] = [
                (part, part.frozen) for part in module.modules() if isinstance(part, ModulePart) and part.frozen
            ]
        for part, names in parts:
            freeze(part, names)


def freeze(part: nn.Module, names: tuple[str, ...]) -> None:
    """Freeze tensors of a part.

    Args:
        part: The part.
        names: Names of its parameters.
    """
    for name in names:
        parameter = part.get_parameter(name)
        if parameter.requires_grad:
            parameter.requires_grad_(False)
