"""Registries: the classes of parts, or of methods, by name; what is none of them is refused where it is put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from .messages import shown

C = TypeVar("C", bound=type)


class Registry(dict[str, C]):
    """Classes by name, a dict.

    Args:
        name: Its own name, for messages.
        base: What its classes derive from.
        classes: Name -> class.
    """

    def __init__(self, name: str, base: type, classes: Mapping[str, C]) -> None:
        super().__init__(classes)
        self.name, self.base = name, base

    def __setitem__(self, name: str, cls: C) -> None:
        """Register a class.

        Args:
            name: What configurations call it.
            cls: The class.

        Raises:
            TypeError: The name is no text, or what is registered is no class of this kind: a function, or an instance.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"{self.name}[{shown(name)}]: a name is a text, as {self.name}['mine'].")
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(
                f"{self.name}[{shown(name)}] = {shown(cls)}: register a class that derives from "
                f"moe_peft.extend.{self.base.__name__}, not an instance of one or a function."
            )
        super().__setitem__(name, cls)
