"""Sizes that differ between layers, as in MoLA (Gao et al., 2024, arXiv 2402.08562).

size(layer) = values[layer * n // L]        for a stack of L layers
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from peft.utils.constants import EMBEDDING_LAYER_NAMES, SEQ_CLS_HEAD_NAMES

from ..messages import shown
from ..place import Place

# Fields that may differ between layers, where a type has them.
SIZES = ("num_experts", "top_k", "r")
MAX_LENGTH = 1024
# Modules that models have beside their numbered layers, by their conventional names.
HEADS = (*EMBEDDING_LAYER_NAMES, *SEQ_CLS_HEAD_NAMES, "embed_out")

C = TypeVar("C", bound=Any)


def sizes_at(per_layer: Mapping[str, Sequence[int]], place: Place) -> dict[str, int]:
    """The sizes of a place; none for one outside of numbered layers, which keeps the plain fields.

    Args:
        per_layer: Field -> values, from the first layer to the last.
        place: A module of the backbone.
    """
    if place.layer_index is None or not place.num_layers:
        return {}
    return {name: values[place.layer_index * len(values) // place.num_layers] for name, values in per_layer.items()}


def layer_places(per_layer: Mapping[str, Sequence[int]]) -> list[Place]:
    """A place for each combination of sizes that layers can have, whatever their number.

    Values change at j / n of a stack, for j from 0 to the n values of a list.

    Args:
        per_layer: Field -> values, from the first layer to the last.
    """
    shares = sorted({Fraction(j, len(values)) for values in per_layer.values() for j in range(len(values))})
    places = [Place.typical(layer_index=share.numerator, num_layers=share.denominator) for share in shares]
    return list({tuple(sizes_at(per_layer, place).values()): place for place in places}.values())


def distinct_places(per_layer: Mapping[str, Sequence[int]], places: Sequence[Place]) -> list[Place]:
    """A place for each combination of sizes that the places of a model have.

    Args:
        per_layer: Field -> values, from the first layer to the last.
        places: Modules of the backbone.
    """
    alike = {tuple(sizes_at(per_layer, place).items()): place for place in places}
    shares = [(place.layer_index, place.num_layers) for place in alike.values()]
    return [Place.typical(layer_index=index, num_layers=count) for index, count in shares]


def may_lie_outside(target_modules: Sequence[str] | set[str] | str | None) -> bool:
    """Whether targets name a head or an embedding, which lies outside of the numbered layers.

    Args:
        target_modules: Names, a regex of full names, or None for the places of the adapter type.
    """
    if isinstance(target_modules, str):
        return any(re.fullmatch(target_modules, f"{parent}{head}") for head in HEADS for parent in ("", "model."))
    return any(name.rpartition(".")[2] in HEADS for name in target_modules or ())


def with_sizes(config: C, sizes: Mapping[str, int]) -> C:
    """A copy of a configuration with other sizes, the same for every layer.

    Args:
        config: The configuration.
        sizes: Field -> value.
    """
    own = copy.copy(config)
    own.per_layer = None
    for name, value in sizes.items():
        setattr(own, name, value)
    return own


def wrong_sizes(config: Any, known: Sequence[str]) -> str | None:
    """Why the sizes of a configuration cannot be.

    Args:
        config: Configuration with a `per_layer`.
        known: Fields that may differ between its layers.

    Returns:
        What `per_layer` must be; None where it is.
    """
    per_layer = config.per_layer
    if not per_layer or not all(name in known for name in per_layer):
        return f"None, or a dict with lists of sizes for names out of {', '.join(map(shown, known))}"
    if not all(isinstance(values, (list, tuple)) and 0 < len(values) <= MAX_LENGTH for values in per_layer.values()):
        return f"a dict with lists of 1 to {MAX_LENGTH} sizes, from the first layer to the last"
    # Lists of one length go together; of others any pair may meet, and the extremes tell whether all can.
    together = len({len(values) for values in per_layer.values()}) == 1
    extremes = [sorted({min(values), max(values)}) for values in per_layer.values()]
    combined = zip(*per_layer.values(), strict=True) if together else itertools.product(*extremes)
    for values in dict.fromkeys(combined):
        sizes = dict(zip(per_layer, values, strict=True))
        try:
            with_sizes(config, sizes).validate()
        except ValueError as error:
            return f"of sizes that a layer can have, and {shown(sizes)} is none: {error}"
    return None
