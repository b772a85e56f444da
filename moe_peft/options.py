"""Reads the options of parts that a configuration gives: `router_args`, `experts_args` and those of `losses`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .messages import shown
from .part import Option, Part


def all_options(parts: Iterable[type[Part]]) -> dict[str, Option]:
    """The options of several parts that are configured together, by name."""
    return {option.name: option for part in parts for option in part.options}


def check_options(parts: Sequence[type[Part]], given: Mapping[str, Any] | None, field: str) -> None:
    """Refuse options that no part has, or values that cannot work.

    Args:
        parts: The parts that the field configures.
        given: Option -> value; None for none.
        field: Name of the configuration's field, for the message.

    Raises:
        ValueError: A name is unknown or a value does not fit; the message names both and what to write instead.
    """
    known = all_options(parts)
    for name, value in (given or {}).items():
        if name not in known:
            words = ", ".join(map(shown, known)) or "none, so leave it None"
            raise ValueError(f"{field}: {shown(name)} is no option of the chosen parts; they have {words}.")
        # Parts of one layer may share a name, and get the same value.
        takers = [(part, option) for part in parts for option in part.options if option.name == name]
        for part, option in takers:
            if not option.accepts(value):
                whose = f" for {part.__name__}" if len(takers) > 1 else ""
                raise ValueError(f"{field}: {name}={shown(value)} must be {option.expected}{whose}.")


def option_values(part: type[Part], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Values of a part's own options: what is given, and defaults elsewhere; names of other parts are passed over."""
    return {option.name: (given or {}).get(option.name, option.default) for option in part.options}


def check_sizes(
    parts: Sequence[type[Part]], given: Mapping[str, Any] | None, sizes: Mapping[str, int], field: str
) -> None:
    """Refuse options that cannot go with the sizes of a layer.

    Args:
        parts: The parts that the field configures.
        given: Option -> value; None for none.
        sizes: As in `Part.misfit`.
        field: Name of the configuration's field, for the message.

    Raises:
        ValueError: They cannot; the message names the option, its value and what it must be.
    """
    for part in parts:
        misfit = part.misfit(option_values(part, given), sizes)
        if misfit is not None:
            raise ValueError(f"{field}: {misfit}.")
