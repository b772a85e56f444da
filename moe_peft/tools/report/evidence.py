"""What advice on a routing is made of, the numbers, and what it is: a finding with its number and a field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .curves import Curves
from .measure import PlaceRouting

Tone = Literal["good", "note", "act"]


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
        kind: One word: "collapsed", "unused", "too_many", "undecided", "alike", "dropped", "moving", "specialised",
            "not_specialised", "no_router", "backbone" or "healthy".
        tone: Whether it is good, a note, or something to act upon.
        title: A few words.
        evidence: The number behind it.
        action: What to do.
        field: The setting to change; None where there is nothing to change.
        places: Names of the places that it is about; empty for all.
    """

    kind: str
    tone: Tone
    title: str
    evidence: str
    action: str
    field: str | None = None
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What advice is made of.

    Attributes:
        places: What was measured.
        divergence: Of the groups, mean over the places; NaN for one group.
        chance: What chance gives for it; NaN where that is not known.
        similarity: Place -> (E, E) cosines.
        curves: Of the training run, if known.
        config: The adapter's configuration, if any.
    """

    places: Sequence[PlaceRouting]
    divergence: float = math.nan
    chance: float = math.nan
    similarity: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    curves: Curves | None = None
    config: Any = None

    @property
    def routed(self) -> list[PlaceRouting]:
        """The places where a router of the adapter chooses among experts."""
        return [place for place in self.places if place.decides == "router" and place.num_experts > 1]

    def has(self, field: str) -> bool:
        """Whether the configuration has a field."""
        return self.config is not None and any(own.name == field for own in dataclasses.fields(self.config))

    def set_to(self, field: str) -> str:
        """A field with its value, as it would be written."""
        return f"{field}={getattr(self.config, field)}"

    def now(self, field: str) -> str:
        """A field's value in brackets, behind a text that names it; nothing where there is no such field."""
        return f" (it is {self.set_to(field)})" if self.has(field) else ""


def names_of(places: Iterable[PlaceRouting]) -> tuple[str, ...]:
    """Names of places.

    Args:
        places: What was measured at each.
    """
    return tuple(place.place for place in places)
