"""A configuration that checks its values: their types, their ranges, and what they are called in messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.config import PeftConfig

from ..messages import shown
from .field_types import wrong_types


@dataclass
class CheckedConfig(PeftConfig):
    """Base of configurations; every refusal names the class, the field, its value and what to write instead."""

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

    def _check_choice(self, name: str, choices: Sequence[object]) -> None:
        self._check(getattr(self, name) in choices, name, f"one of {', '.join(map(shown, choices))}")
