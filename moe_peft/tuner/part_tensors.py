"""Refuses parts whose tensors a file would lose or not load: those in modules below a part, random ones that nothing
saves, and those of other shapes than the part's class says.

A key of an adapter is `<module>.<prefix><attribute>.<adapter>.<parameter>`, so that a part's tensors are attributes of
the part itself. What a part draws when it is built, and keeps as a plain attribute or as a buffer that is not saved,
is drawn anew where the adapter is loaded: the same file would compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..config.config import MoeConfig
from ..config.parts import RoutedParts
from ..messages import shown
from ..place import Place


def check_saved(config: MoeConfig, place: Place, parts: RoutedParts) -> None:
    """Refuse parts whose tensors would not come back from a file.

    Args:
        config: The configuration of the place.
        place: Where they stand.
        parts: What the configuration builds there, on any device.

    Raises:
        ValueError: A tensor lies in a module below a part, or is drawn and not saved.
    """
    for part in _modules(parts):
        below = [name for name in part.state_dict() if "." in name]
        if below:
            raise ValueError(
                f"{type(part).__name__} keeps {shown(below)} in modules below it, which an adapter's file has no "
                "names for. Make them parameters of the part itself, as self.up = nn.Parameter(...), and call "
                "torch.nn.functional with them."
            )
    if any(True for part in _modules(parts) for _ in _unsaved(part)):
        _check_drawn(config, place)


def check_declared(config: MoeConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors of other shapes than a configuration says of them, by which its files are checked on loading.

    Args:
        config: The configuration, resolved for the model.
        shapes: Of all tensors that the adapter will have, by their keys.

    Raises:
        ValueError: A shape begins in another way.
    """
    expected = config.expected_shapes()
    for key, shape in shapes.items():
        for ending, begins in expected.items():
            if key.endswith(ending) and shape[: len(begins)] != begins:
                raise ValueError(
                    f"{key} has the shape {shape}, where {type(config).__name__} says that it begins with {begins}: "
                    "the saved adapter could not be loaded. Let the expert kind's `shapes` say what its "
                    "constructor makes, or the configuration's `expected_shapes`."
                )


def _check_drawn(config: MoeConfig, place: Place) -> None:
    """Build twice from different random numbers, and refuse what differs without being saved."""
    built = []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for seed in (0, 1):
            torch.manual_seed(seed)
            built.append(config.build(place))
    for one, other in zip(*map(_modules, built), strict=True):
        found = dict(_unsaved(other))
        for name, tensor in _unsaved(one):
            if name not in found or not _equal(tensor, found[name]):
                raise ValueError(
                    f"{type(one).__name__}.{name} is drawn when the part is built and not saved with the adapter, "
                    "which would compute something else once it is loaded. Make it a parameter, as "
                    f"self.{name.rpartition('.')[2]} = nn.Parameter(..., requires_grad=False), and name it in the "
                    "class's `frozen`."
                )


def _modules(parts: RoutedParts) -> list[nn.Module]:
    return [part for part in (parts.experts, parts.router) if part is not None]


def _unsaved(part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a part, and of its gate and selector, that its state dict does not hold, by name."""
    saved = {id(tensor) for tensor in part.state_dict(keep_vars=True).values()}
    for prefix, module in part.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in saved:
                yield f"{dot}{name}", buffer
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from ((f"{dot}{own}", tensor) for own, tensor in _tensors(name, value))


def _tensors(name: str, value: Any, depth: int = 2) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in a value: itself, in a list, tuple or dict, or an attribute of an object that is no module."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, nn.Module) or depth == 0:
        return
    elif isinstance(value, dict):
        for key, own in value.items():
            yield from _tensors(f"{name}.{key}", own, depth - 1)
    elif isinstance(value, (list, tuple)):
        for index, own in enumerate(value):
            yield from _tensors(f"{name}.{index}", own, depth - 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for key, own in vars(value).items():
            yield from _tensors(f"{name}.{key}", own, depth - 1)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
