"""Configurations for another number of experts, and which dimension of each tensor counts them.

The parts are asked: they are built twice without memory, for one expert more.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..place import Place


def resized(config: Any, num_experts: int) -> Any:
    """A configuration for another number of experts; a token uses no more than there are.

    Args:
        config: Of an adapter.
        num_experts: E.
    """
    fields: dict[str, Any] = {"num_experts": num_experts}
    top_k = getattr(config, "top_k", None)
    if top_k is not None:
        fields["top_k"] = min(top_k, num_experts)
    if num_experts == 1 and getattr(config, "norm_topk_prob", False):
        fields["top_k"] = 1
    return dataclasses.replace(config, **fields)


def expert_dimensions(config: Any, place: Place) -> dict[tuple[str, str], list[int]]:
    """Which dimensions of each tensor grow with the number of experts.

    Args:
        config: Of an adapter, with `num_experts`.
        place: Any module that it fits.

    Returns:
        ("experts" or "router", name of a parameter there) -> its dimensions that count experts.

    Raises:
        ValueError: The parts take no expert more, or a tensor that grows with the experts has no row for each of them.
    """
    found: dict[tuple[str, str], list[int]] = {}
    with torch.device("meta"):
        one, more = (resized(config, count).build(place) for count in (config.num_experts, config.num_experts + 1))
    pairs: list[tuple[str, nn.Module | None, nn.Module | None]] = [
        ("experts", one.experts, more.experts),
        ("router", one.router, more.router),
    ]
    for attribute, small, large in pairs:
        if small is not None and large is not None:
            sizes = dict(large.named_parameters())
            for name, parameter in small.named_parameters():
                both = list(zip(parameter.shape, sizes[name].shape, strict=True))
                found[attribute, name] = [index for index, (a, b) in enumerate(both) if a != b]
                if any(b != a + 1 or a < config.num_experts for a, b in both if a != b):
                    raise ValueError(
                        f"{type(small).__name__}: {name} of shape {tuple(parameter.shape)} has no row for each of "
                        f"{config.num_experts} experts."
                    )
    return found
