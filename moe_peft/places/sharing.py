"""Places of one block that share a decision: the first decides, the others follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..place import Place


def share_decisions(places: Sequence[Place]) -> list[Place]:
    """Let the first place of every parent module decide for the others that read rows of the same kind.

    Args:
        places: Places in the model's order.

    Returns:
        The same places with `block`, and `leader` where they follow one. A place that is alone keeps to itself.
    """
    blocks: dict[tuple[str, str], list[str]] = {}
    for place in places:
        blocks.setdefault(_block_of(place), []).append(place.name)
    shared = []
    for place in places:
        first, *others = blocks[_block_of(place)]
        parent, rows = _block_of(place)
        block = f"{parent}:{rows}" if others else None
        shared.append(replace(place, block=block, leader=None if place.name == first else first))
    return shared


def _block_of(place: Place) -> tuple[str, str]:
    return place.name.rpartition(".")[0], place.rows
