"""One expert more for a trained adapter: it starts as nothing, as a copy of another expert, or as a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..layers import RoutedLayer
from ..messages import shown
from .checks import check_peft_model
from .compose import put_pair
from .expert_vectors import as_numbers, description_of, description_width
from .other_experts import NEW, check_new, routed_by_name, with_experts
from .stock_lora import read_lora


@torch.no_grad()
def add_expert(
    model: PeftModel,
    new_name: str,
    *,
    lora: str | Path | None = None,
    copy_of: int | None = None,
    description: torch.Tensor | Sequence[float] | None = None,
    adapter_name: str = "default",
) -> None:
    """Add an adapter that is another one with an expert more, which comes last.

    The router's numbers for the old experts stay, and those of the new one start as they do in training, or as those
    of the copied expert.

    Args:
        model: A model with the adapter, which stays.
        new_name: Name of the adapter to make; it becomes the active one.
        lora: Folder of a LoRA of stock peft that the new expert equals.
        copy_of: Number of the expert that the new one equals. With neither it adds nothing until it is trained.
        description: (width,) of the new expert, for a router that makes its rows of descriptions and so needs no
            training for it; without one the expert's is random, or that of the copied expert.
        adapter_name: The adapter that gets an expert more.

    Raises:
        ValueError: Both are given, there is no such expert, or the LoRA or the description does not fit the adapter.
            Nothing has been changed.
    """
    check_peft_model(model, "add_expert")
    layers = routed_by_name(model, adapter_name)
    check_new(model, adapter_name, new_name)
    count = next(iter(layers.values())).experts[adapter_name].num_choices
    if lora is not None and copy_of is not None:
        raise ValueError("add_expert takes lora or copy_of, not both.")
    if copy_of is not None and (type(copy_of) is not int or copy_of not in range(count)):
        raise ValueError(f"copy_of={shown(copy_of)} must be the number of an expert, 0 to {count - 1}.")
    vector = None if description is None else _vector(layers, adapter_name, description)
    found = None if lora is None else read_lora(str(lora))
    for place, pair in {} if found is None else found.pairs.items():
        bank = layers[place].experts[adapter_name] if place in layers else None
        shape = None if bank is None or not hasattr(bank, "B") else (bank.A.shape[2], bank.B.shape[2], bank.A.shape[1])
        own = (pair.A.shape[1], pair.B.shape[0], pair.rank)
        if shape is None or shape[:2] != own[:2] or own[2] > shape[2]:
            raise ValueError(
                f"The LoRA in {shown(str(lora))} has (in, out, rank) {own} at {shown(place)}, where the adapter's "
                f"experts have {shape}. Compose the adapter's LoRAs anew with this one (compose)."
            )
    last = NEW if copy_of is None else copy_of
    layers = with_experts(model, adapter_name, new_name, {name: [*range(count), last] for name in layers})
    for name, layer in layers.items():
        bank = layer.experts[new_name]
        if copy_of is None:
            for up in bank.up:
                bank.get_parameter(up)[count].zero_()
        if found is not None:
            put_pair(bank, count, found.pairs.get(name))
        if vector is not None:
            vectors_EW = description_of(layer, new_name)
            vectors_EW[count] = vector.to(vectors_EW)


def _vector(layers: dict[str, RoutedLayer], adapter_name: str, description: Any) -> torch.Tensor:
    """The description as a tensor, checked against the adapter's."""
    width = description_width(layers, adapter_name, "add_expert: description")
    vector = as_numbers(description, "add_expert: description")
    if tuple(vector.shape) != (width,):
        raise ValueError(
            f"add_expert: description has the shape {tuple(vector.shape)}, where the adapter's descriptions have "
            f"({width},). Embed the new expert's texts as those of the others."
        )
    return vector
