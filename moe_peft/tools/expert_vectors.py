"""Descriptions of the experts, for routers that make their rows of them: an embedding of each expert's domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from ..layers import RoutedLayer
from ..messages import shown
from .checks import check_finite, check_peft_model
from .other_experts import routed_by_name


@torch.no_grad()
def describe_experts(
    model: PeftModel, vectors: torch.Tensor | Sequence[Sequence[float]], adapter_name: str = "default"
) -> None:
    """Set the description of each expert, the same at every place.

    Args:
        model: A model with an adapter whose router makes its rows of descriptions; `add_expert` adds one to them.
        vectors: (E, width), as the mean embedding of each expert's texts by any model of embeddings.
        adapter_name: Which adapter.

    Raises:
        TypeError: The model is no `PeftModel`.
        ValueError: The adapter's router takes no descriptions, or the numbers do not fit; nothing has been changed.
    """
    check_peft_model(model, "describe_experts")
    layers = routed_by_name(model, adapter_name)
    width = description_width(layers, adapter_name, "describe_experts")
    numbers = as_numbers(vectors, "describe_experts: vectors")
    counts = {layer.router[adapter_name].num_experts for layer in layers.values()}
    if tuple(numbers.shape) != (min(counts), width) or len(counts) != 1:
        raise ValueError(
            f"describe_experts: vectors has the shape {tuple(numbers.shape)}, but the adapter has "
            f"{shown(sorted(counts))} experts with descriptions of width {width}. Give a row for each expert."
        )
    for layer in layers.values():
        own = description_of(layer, adapter_name)
        own.copy_(numbers.to(own))


def description_of(layer: RoutedLayer, adapter_name: str) -> torch.Tensor:
    """(E, width) descriptions of the experts at a layer.

    Args:
        layer: With a router that has some.
        adapter_name: Which adapter.
    """
    router: Any = layer.router[adapter_name]
    parameter: torch.Tensor = router.get_parameter(router.descriptions)
    return parameter


def description_width(layers: dict[str, RoutedLayer], adapter_name: str, caller: str) -> int:
    """Width of the descriptions of an adapter's experts.

    Args:
        layers: Those that hold it.
        adapter_name: Which adapter.
        caller: For the message.

    Raises:
        ValueError: A router takes none.
    """
    for layer in layers.values():
        if adapter_name not in layer.router or layer.router[adapter_name].descriptions is None:
            raise ValueError(
                f"{caller}: the router of the adapter {shown(adapter_name)} makes no rows of descriptions. Use a "
                "scorer that does (descriptions)."
            )
    return int(description_of(next(iter(layers.values())), adapter_name).shape[1])


def as_numbers(values: Any, what: str) -> torch.Tensor:
    """Numbers that a user gave, as a tensor.

    Args:
        values: A tensor, or lists of numbers.
        what: What they are, for the message.

    Raises:
        ValueError: They are none, or one is not finite.
    """
    try:
        numbers = torch.as_tensor(values).detach().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what}={shown(values)} must be a tensor or lists of numbers.") from error
    check_finite(numbers, f"{what}: the numbers", "Embed the texts again.")
    return numbers
