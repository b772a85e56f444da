"""Which tensors of a file are an adapter's own, by place, and how those of its experts start."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

import torch

from ..config.adapter_files import AdapterFile
from ..config.config import MoeConfig
from ..config.fields import MixtureConfig
from ..messages import shown
from ..part import ModulePart
from ..tuner.tensors import PEFT_PREFIX


def tensors_by_place(header: AdapterFile, prefix: str) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    """Keys of the adapter's own tensors by place and by name there, and the numbers of other modules.

    Args:
        header: Of the file.
        prefix: What the attributes of the adapter's type begin with.

    Raises:
        ValueError: The file holds none of them.
    """
    own = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?(?P<place>.*)\.{prefix}(?P<rest>(?:experts|router)\..+)")
    places: dict[str, dict[str, str]] = defaultdict(dict)
    further: dict[str, int] = defaultdict(int)
    for key, shape in header.shapes.items():
        match = own.fullmatch(key)
        if match:
            places[match["place"]][match["rest"]] = key
        else:
            further[key.removeprefix(PEFT_PREFIX).rpartition(".")[0]] += math.prod(shape)
    if not places:
        raise ValueError(
            f"{header.name} holds none of this adapter's tensors (their names have {shown(prefix)}). It is of another "
            "adapter, or was written by hand."
        )
    return dict(places), dict(further)


class Starts:
    """How the tensors of an adapter's experts start, as the classes of experts say.

    Where the configuration names one kind of experts, a bank of it is asked; elsewhere all classes are, by endings of
    names.

    Args:
        config: Of the adapter.
    """

    def __init__(self, config: MoeConfig) -> None:
        self._exact = isinstance(config, MixtureConfig)
        parts = [_bank(config)] if isinstance(config, MixtureConfig) else _kinds(ModulePart)
        self._up = {name for part in parts for name in part.up}
        self._ones = {name for part in parts for name in part.ones}

    def carries_out(self, name: str) -> bool:
        """Whether a tensor of an expert starts at zero and carries its result out.

        Args:
            name: Of the parameter.
        """
        return name in self._up or (not self._exact and name.endswith(tuple(f"_{own}" for own in self._up)))

    def value(self, name: str) -> float | None:
        """What all numbers of a tensor are before training; None where they are random or copied.

        Args:
            name: Of the parameter.
        """
        if self.carries_out(name):
            return 0.0
        return 1.0 if name in self._ones else None


def expert_tensors(header: AdapterFile, prefix: str) -> dict[str, tuple[str, str]]:
    """The tensors of experts in a file: key -> name of the place, and of the tensor there.

    Args:
        header: Of the file.
        prefix: What the attributes of the adapter's type begin with.
    """
    places, _ = tensors_by_place(header, prefix)
    own = {key: (place, rest) for place, keys in places.items() for rest, key in keys.items()}
    return {
        key: (place, rest.removeprefix("experts."))
        for key, (place, rest) in own.items()
        if rest.startswith("experts.")
    }


def kind_of_place(place: str) -> str:
    """A place without the number of its layer.

    Args:
        place: Its full name.
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", place)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key by which names are sorted with their numbers as numbers.

    Args:
        name: Any.
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _bank(config: MixtureConfig) -> Any:
    """Experts of the kind that a configuration names, without memory, at a place of any sizes."""
    place = dataclasses.replace(config.typical_places()[0], num_experts=2, inner_features=8)
    with torch.device("meta"):
        return config.at(place).build(place).experts


def _kinds(cls: type[Any]) -> set[type[Any]]:
    return {own for sub in cls.__subclasses__() for own in {sub, *_kinds(sub)}}
