"""What gives an adapter's saved tensors their meaning: the fields under which the same tensors compute the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from .stored import stored

# Metadata of a field that changes nothing about what the saved tensors compute.
NOT_MEANING = {"meaning": False}


def meaning_of(config: Any, skipped: Container[str]) -> dict[str, Any]:
    """Fields that say what the tensors of a configuration compute.

    A field counts unless a class that declares it puts `NOT_MEANING` into its metadata, so that one that nobody
    thought of is compared, and a subclass with another default need not repeat it.

    Args:
        config: Instance of a dataclass with a class attribute `adapter_type`.
        skipped: Names of fields that do not count whatever their metadata.

    Returns:
        Name -> value of JSON's types, sets as sorted lists.
    """
    values: dict[str, Any] = {"adapter_type": config.adapter_type}
    for own in dataclasses.fields(config):
        if own.name not in skipped and _counts(type(config), own.name):
            values[own.name] = plain(getattr(config, own.name))
    return values


def _counts(cls: type, name: str) -> bool:
    declared = [vars(base).get("__dataclass_fields__", {}).get(name) for base in cls.__mro__]
    return all(own.metadata.get("meaning", True) for own in declared if own is not None)


def plain(value: Any) -> Any:
    """A value of JSON's types: mappings with string keys, sets and tuples as lists, numbers as Python's own."""
    value = stored(value)
    if isinstance(value, Mapping):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(own) for own in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if isinstance(value, str):
        return str(getattr(value, "value", value))
    return float(value) if isinstance(value, float) else value
