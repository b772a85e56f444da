"""Numbers of an adapter's parts that may change while it lives: where they are, what they may be, how they are set."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..config.config import MoeConfig
from ..layers import routed_layers
from ..messages import shown
from ..part import Part

# Fields of a configuration that hold options of parts.
OPTIONS = ("router_args", "experts_args")


def varying(part: object) -> frozenset[str]:
    """Names of a part's numbers that may change, those of its bases included; none of what is no part."""
    if not isinstance(part, Part):
        return frozenset()
    return frozenset().union(*(vars(cls).get("varies", frozenset()) for cls in type(part).__mro__))


def parts_with(model: nn.Module, name: str, adapter_name: str | None = None) -> list[Part]:
    """The parts of all layers that have a number of some name.

    Args:
        model: A model with routed adapters.
        name: As "top_k" or "tau".
        adapter_name: Of one adapter; None for all.

    Returns:
        Scorers, gates, selectors and banks, each once.
    """
    return [part for part in _parts(model, adapter_name) if name in varying(part)]


def known_values(model: nn.Module, adapter_name: str | None = None) -> list[str]:
    """Names of all numbers that may change, sorted; arguments as in `parts_with`."""
    return sorted(frozenset[str]().union(*(varying(part) for part in _parts(model, adapter_name))))


def get_value(part: Part, name: str) -> Any:
    """A number of a part; the probability of a dropout."""
    value = getattr(part, name)
    return value.p if isinstance(value, nn.Dropout) else value


def set_value(part: Part, name: str, value: Any) -> None:
    """Set a number of a part; the probability where it is a dropout."""
    current = getattr(part, name)
    if isinstance(current, nn.Dropout):
        current.p = value
    else:
        setattr(part, name, value)


def with_value(config: MoeConfig, name: str, value: Any) -> MoeConfig:
    """A configuration with another number of a part.

    Args:
        config: The adapter's configuration, which stays as it is.
        name: A field, or an option of the router's parts or of the experts.
        value: The number.

    Raises:
        ValueError: The adapter cannot have it; the message says what it may be.
    """
    changed = copy.copy(config)
    field = _field(config, name)
    if name in (getattr(config, "per_layer", None) or {}):
        raise ValueError(f"{name}={shown(value)} cannot be set, as per_layer gives each layer its own {name}.")
    setattr(changed, field, value if field == name else {**(getattr(config, field) or {}), name: value})
    changed.recheck()
    return changed


def write_value(config: MoeConfig, name: str, value: Any) -> None:
    """Put a number into a configuration, so that what is saved from here on computes with it."""
    field = _field(config, name)
    setattr(config, field, getattr(with_value(config, name, value), field))


def _field(config: MoeConfig, name: str) -> str:
    if name in config.__dataclass_fields__:
        return name
    for field in OPTIONS:
        own, changed = getattr(config, field, None), copy.copy(config)
        if field not in config.__dataclass_fields__:
            continue
        setattr(changed, field, {**(own or {}), name: object()})
        try:
            changed.validate()
        except ValueError as error:
            if "is no option" not in str(error):
                return field
    raise ValueError(f"{name} is neither a field of {type(config).__name__} nor an option of its parts.")


def _parts(model: nn.Module, adapter_name: str | None) -> Iterator[Part]:
    for layer in routed_layers(model):
        for own, bank in layer.experts.items():
            if adapter_name not in (None, own):
                continue
            router = layer.router_of(own)
            for part in (bank, router, getattr(router, "gate", None), getattr(router, "select", None)):
                if isinstance(part, Part):
                    yield part
