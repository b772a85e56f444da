"""Values that JSON has no form for come back from a file as their fields declare them."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Optional

import pytest

from moe_peft import LoraMoeConfig
from moe_peft.config.stored import as_declared, stored, unannotated


class Kind(enum.Enum):
    SOFT = "soft"
    HARD = "hard"


class Level(str, enum.Enum):
    LOW = "low"


@dataclass
class Warmup:
    steps: int = 10
    shape: tuple[float, ...] = (1.0,)


@dataclass
class OwnConfig(LoraMoeConfig):
    mode: Literal["soft", "hard"] = "soft"
    span: tuple[int, int] = (0, 1)
    kind: Kind = Kind.SOFT
    level: Optional[Level] = None  # noqa: UP045, as others write it
    names: Sequence[str] | None = None
    some: set[str] = field(default_factory=set)
    bare: dict = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    kinds: list[Kind] = field(default_factory=list)
    path: Path | None = None
    warmup: Warmup = field(default_factory=Warmup)
    width: Annotated[int, "in pixels"] = 3
    unknown: NoSuchType = 0  # noqa: F821


GIVEN = {
    "mode": "hard",
    "span": (2, 3),
    "kind": Kind.HARD,
    "level": Level.LOW,
    "names": ["a"],
    "some": {"b", "a"},
    "bare": {"x": 1},
    "rates": {"a": 0.5},
    "kinds": [Kind.HARD, Kind.SOFT],
    "path": Path("some/where"),
    "warmup": Warmup(5, (0.5, 1.0)),
    "width": 4,
    "unknown": "anything",
}


def test_a_configuration_holds_what_it_was_given_after_a_file_of_json():
    config = OwnConfig(**GIVEN)
    written = {
        name: list(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name != "peft_type"
    }
    again = OwnConfig(**json.loads(json.dumps(written)))
    for name, value in GIVEN.items():
        assert getattr(config, name) == value, name
        if not dataclasses.is_dataclass(value):
            assert getattr(again, name) == value and type(getattr(again, name)) is type(value), name
    assert again.warmup.steps == 5 and list(again.warmup.shape) == [0.5, 1.0]
    assert again.meaning() == config.meaning()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mode", "wrong", "must be one of 'soft', 'hard', as in mode='soft'"),
        ("mode", 1, "must be one of 'soft', 'hard'"),
        ("span", (1, 2, 3), "must be a list of an integer, an integer"),
        ("span", ("1", "2"), "must be a list of an integer, an integer"),
        ("kind", "none", "must be one of 'soft', 'hard'"),
        ("level", "high", "must be one of 'low' or None"),
        ("names", 3, "must be a list of strings or None"),
        ("some", [1], "must be a list of strings"),
        ("bare", {"x": object()}, "must be a value that adapter_config.json can hold"),
        ("rates", {"a": "b"}, "must be a dict from strings to finite numbers"),
        ("kinds", ["soft", "other"], "must be a list of some of 'soft', 'hard'"),
        ("path", 3, "must be"),
        ("warmup", {"step": 1}, "must be a Warmup"),
        ("width", "4", "must be an integer; write width=4"),
        ("unknown", object(), "must be a value of JSON"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_when_the_configuration_is_made(name, value, message):
    with pytest.raises(ValueError, match=f"OwnConfig: {name}=.* {message}"):
        OwnConfig(**{name: value})


def test_values_are_written_without_what_json_lacks():
    value = {"a": (Kind.HARD, {2, 1}), "b": [Path("x"), Warmup()]}
    assert json.loads(json.dumps(stored(value))) == {"a": ["hard", [1, 2]], "b": ["x", {"steps": 10, "shape": [1.0]}]}
    assert stored({"b", "a"}) == {"a", "b"}


def test_a_list_is_taken_as_what_is_declared_and_a_declared_value_as_it_is():
    value = [1]
    assert as_declared(value, list[int]) == value
    assert as_declared(["soft"], tuple[Kind, ...]) == (Kind.SOFT,)
    assert as_declared([["soft"]], list[frozenset[Kind]]) == [frozenset({Kind.SOFT})]
    assert unannotated(Annotated[int, "x"]) is int and unannotated(int) is int
