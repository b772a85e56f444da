"""Is a saved adapter whole, and did its experts learn? Read from its files, without the base model's weights.

Broken is what would not load, or would load as something else: a truncated file, tensors that are missing or not
finite, a configuration that does not belong to the weights. Remarks are about a whole adapter that has not learned as
meant: experts whose up matrices are zero, experts that are equal, routers whose scores hardly differ.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import safe_open
from torch import nn

from ..config.adapter_files import (
    CONFIG,
    AdapterFile,
    check_adapter_files,
    check_finite,
    find_weights,
    read_header,
    read_json_object,
)
from ..config.config import MoeConfig
from ..config.stamp import check_meaning, saved_meaning
from ..messages import shown
from ..places.choose import find_places, resolve_targets
from ..telemetry.history import FILE_NAME, RoutingHistory
from ..tuner.tensors import PEFT_PREFIX, planned_tensors
from .adapter_tensors import Starts, kind_of_place, natural_order, tensors_by_place

LISTED = 8
DEAD_SHARE = 0.01


@dataclass(frozen=True)
class PlaceHealth:
    """One place of an adapter.

    Attributes:
        name: Name of the module.
        parameters: Saved numbers.
        num_experts: Experts there.
        dead: Experts that add nothing: the matrices that carry their result out are zero.
        equal: Pairs of experts with the same numbers.
        router_norms: Smallest and largest length of the router's rows; None without a router of rows.
    """

    name: str
    parameters: int
    num_experts: int
    dead: tuple[int, ...] = ()
    equal: tuple[tuple[int, int], ...] = ()
    router_norms: tuple[float, float] | None = None


@dataclass(frozen=True)
class AdapterHealth:
    """What the files of an adapter say.

    Attributes:
        config: Its configuration.
        path: Its weights.
        bytes: Size of them.
        places: One by one.
        further: Saved numbers of modules that are trained in full, by module.
        zero: Tensors that are zero throughout, of an adapter that has learned elsewhere.
        checked_against: The base model whose places were compared, if any.
        unused: Experts that the last reading of the run's telemetry found with next to no requests, by place.
    """

    config: MoeConfig
    path: Path
    bytes: int
    places: list[PlaceHealth]
    further: dict[str, int] = field(default_factory=dict)
    zero: tuple[str, ...] = ()
    checked_against: str | None = None
    unused: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Saved numbers."""
        return sum(place.parameters for place in self.places) + sum(self.further.values())

    @property
    def untrained(self) -> bool:
        """Whether no expert anywhere has learned anything."""
        return bool(self.places) and all(len(place.dead) == place.num_experts for place in self.places)

    def remarks(self) -> list[str]:
        """What a whole adapter has not learned as meant, a line each."""
        if self.untrained:
            return ["untrained: every expert adds nothing, so the adapted model is the base model"]
        lines = [f"{name} is zero throughout" for name in self.zero]
        lines += [f"{p.name}: experts {_listed(p.dead)} add nothing" for p in self.places if p.dead]
        lines += [f"{p.name}: experts {_listed(p.equal)} are equal" for p in self.places if p.equal]
        lines += [
            f"{name}: experts {_listed(ids)} got next to no tokens at the end" for name, ids in self.unused.items()
        ]
        return lines


def inspect_adapter(folder: str | Path, base: nn.Module | None = None) -> AdapterHealth:
    """Read an adapter's files and check them.

    Args:
        folder: Folder of a saved adapter.
        base: Its base model, best on the meta device, to find missing places by; None compares the places with each
            other.

    Raises:
        ValueError: It is broken, or no adapter of this package; the message says where.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        there = "holds no adapter_config.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {there}. Name the folder that model.save_pretrained or a training script wrote.")
    config = read_config(folder)
    path = find_weights(folder)
    assert path is not None
    header = read_header(path)
    meaning = saved_meaning(header)
    if meaning is not None:
        check_meaning(str(path), meaning, config.meaning(), f"the {CONFIG} beside it")
    check_finite(path)
    check_adapter_files(str(folder), None, config.expected_shapes())
    prefix = f"{config.adapter_type.lower()}_"
    by_place, further = tensors_by_place(header, prefix)
    _refuse_incomplete(header, by_place)
    if base is not None:
        _compare(header, config, prefix, base)
    places, zero, starts = [], [], Starts(config)
    with safe_open(path, framework="pt") as file:
        for name, keys in sorted(by_place.items(), key=lambda item: natural_order(item[0])):
            tensors = {own: file.get_tensor(key) for own, key in keys.items()}
            places.append(_place_health(name, tensors, starts))
            zero += [f"{name}: {own}" for own, tensor in tensors.items() if tensor.numel() and not tensor.any()]
    named = getattr(getattr(base, "config", None), "name_or_path", None) if base is not None else None
    health = AdapterHealth(
        config=config,
        path=path,
        bytes=path.stat().st_size,
        places=places,
        further=further,
        zero=tuple(zero),
        checked_against=(named or type(base).__name__) if base is not None else None,
        unused=_unused(folder),
    )
    return health


def read_config(folder: Path) -> MoeConfig:
    """Read the configuration of an adapter of this package.

    Args:
        folder: Its folder.

    Raises:
        ValueError: It cannot be read, or is of another package.
    """
    found = read_json_object(folder / CONFIG).get("peft_type")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} has the unknown peft_type {shown(found)}. Upgrade peft-moe.") from error
    if not isinstance(config, MoeConfig):
        raise ValueError(
            f"{folder} holds an adapter of the type {shown(found)}, which is peft's own and not of moe_peft."
        )
    return config


def _refuse_incomplete(header: AdapterFile, places: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse places that lack what their sisters in other layers have."""
    sisters: dict[str, set[str]] = defaultdict(set)
    for name, keys in places.items():
        sisters[kind_of_place(name)] |= set(keys)
    lost = {name: sorted(sisters[kind_of_place(name)] - set(keys)) for name, keys in places.items()}
    missing = [f"{name}: {own}" for name, names in lost.items() for own in names]
    if missing:
        raise ValueError(
            f"{header.name} lacks {len(missing)} tensors, the first is {missing[0]}. It is incomplete: copy or "
            "download it again, or take an earlier checkpoint."
        )


def _compare(header: AdapterFile, config: MoeConfig, prefix: str, base: nn.Module) -> None:
    """Refuse what is not what the adapter has on its base model."""
    config = copy.deepcopy(config)
    resolve_targets(base, config)
    planned = planned_tensors(config, prefix, find_places(base, config))
    found = {key.removeprefix(PEFT_PREFIX): shape for key, shape in header.shapes.items() if f".{prefix}" in key}
    for what, keys in (("lacks", planned.keys() - found.keys()), ("holds besides", found.keys() - planned.keys())):
        if keys:
            raise ValueError(
                f"{header.name} {what} {len(keys)} of the tensors that it has on {type(base).__name__}, the first is "
                f"{min(keys, key=natural_order)}. It is incomplete, or of another base model."
            )
    for key, shape in planned.items():
        if found[key] != shape:
            raise ValueError(f"{header.name}: {key} has the shape {found[key]}, but on {type(base).__name__} {shape}.")


def _place_health(name: str, tensors: Mapping[str, torch.Tensor], starts: Starts) -> PlaceHealth:
    bank = {own.removeprefix("experts."): t for own, t in tensors.items() if own.startswith("experts.")}
    sizes = {tensor.shape[0] for tensor in bank.values() if tensor.dim()}
    num_experts = sizes.pop() if len(sizes) == 1 else 1
    ups = [own for own in bank if starts.carries_out(own)]
    dead, equal = [], []
    seen: dict[str, int] = {}
    for expert in range(num_experts):
        slices = {own: (tensor[expert] if num_experts > 1 else tensor) for own, tensor in bank.items()}
        if ups and not any(bool(slices[own].any()) for own in ups):
            dead.append(expert)
            continue
        digest = hashlib.sha256(b"".join(_bytes(slices[own]) for own in sorted(slices))).hexdigest()
        if digest in seen:
            equal.append((seen[digest], expert))
        seen.setdefault(digest, expert)
    rows = tensors.get("router.weight")
    norms = None
    if rows is not None and rows.dim() == 2:
        lengths = rows.float().norm(dim=1)
        norms = (float(lengths.min()), float(lengths.max()))
    count = sum(tensor.numel() for tensor in tensors.values())
    return PlaceHealth(name, count, num_experts, tuple(dead), tuple(equal), norms)


def _unused(folder: Path) -> dict[str, list[int]]:
    """Experts with next to no requests at the end of the run, where its telemetry is beside the adapter."""
    if not (folder / FILE_NAME).is_file():
        return {}
    history = RoutingHistory.load(folder)
    found: dict[str, list[int]] = {}
    for name, rows in history.rows.items():
        kind, _, place = name.partition("/")
        if kind == "load" and rows:
            last = rows[max(rows)]
            few = [index for index, share in enumerate(last.tolist()) if share < DEAD_SHARE / len(last)]
            if few:
                found[place.rpartition("/")[0]] = few
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _listed(items: tuple[Any, ...] | list[Any]) -> str:
    text = ", ".join(str(item) for item in items[:LISTED])
    return text if len(items) <= LISTED else f"{text} and {len(items) - LISTED} more"
