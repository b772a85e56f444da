"""A configuration that checks its values: their types, their ranges, and what they are called in messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.config import PeftConfig

from ..messages import shown
from .field_types import declared, field_types, wrong_types


@dataclass
class CheckedConfig(PeftConfig):
    """Base of configurations; every refusal names the class, the field, its value and what to write instead."""

    def _take_as_declared(self) -> None:
        """Hold tuples, sets, enums and the like as their fields declare them, also where a file gave lists."""
        types = field_types(type(self))  # type: ignore[arg-type]  # mypy holds classes for unhashable
        for own in dataclasses.fields(self):
            value = getattr(self, own.name)
            taken = declared(value, types[own.name])
            if taken is not value:
                setattr(self, own.name, taken)

    def _check_types(self) -> None:
        for name, hint in wrong_types(self):
            self._check(False, name, hint)

    def _check(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {name}={shown(getattr(self, name))} must be {expected}.")

    def _check_left_alone(self, name: str, reason: str, of_group: bool = False) -> None:
        """Refuse a value that is not the default, of this type or of the group of fields that a field is from."""
        groups = [base for base in type(self).__mro__ if name in base.__dict__.get("__dataclass_fields__", {})]
        group: Any = groups[-1] if of_group else type(self)
        default = next(own for own in dataclasses.fields(group) if own.name == name).default
        self._check(getattr(self, name) == default, name, f"left at {shown(default)}: {reason}")

    def _check_choice(self, name: str, choices: Sequence[object], note: str = "") -> None:
        self._check(getattr(self, name) in choices, name, f"one of {', '.join(map(shown, choices))}{note}")
