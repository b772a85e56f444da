"""An adapter with others of its experts, beside it under a new name: some left out, some new.

What the adapter trains beside its experts and routers, as whole modules and embeddings of tokens, is taken over too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from ..config.expert_dimensions import expert_dimensions, resized
from ..layers import RoutedLayer
from ..messages import shown
from ..place import Place
from .beside import copy_further
from .checks import check_finite_adapter, check_module, check_text

# Stands for an expert that is new.
NEW = -1


def with_experts(
    model: PeftModel, adapter_name: str, new_name: str, experts: Mapping[str, Sequence[int]]
) -> dict[str, RoutedLayer]:
    """Add an adapter that has some experts of another one.

    Args:
        model: A model with the adapter, which stays.
        adapter_name: The adapter whose experts are taken.
        new_name: Name of the new one, which is made active.
        experts: Full name of a layer -> its experts' numbers in the old adapter, `NEW` for one that starts anew; as
            many everywhere.

    Returns:
        The layers by their full names.

    Raises:
        ValueError: There is no such adapter or no number of experts to change, the new name is taken, or the layers'
            counts differ. Nothing has been changed.
    """
    layers = routed_by_name(model, adapter_name)
    check_new(model, adapter_name, new_name)
    config = model.peft_config[adapter_name]
    counts = {len(own) for own in experts.values()}
    if experts.keys() != layers.keys() or len(counts) != 1 or 0 in counts:
        raise ValueError(f"experts={shown(experts)} must name the same number of experts at each of the layers.")
    new = resized(config, counts.pop())
    model.add_adapter(new_name, new)
    model.set_adapter(new_name)
    for name, layer in layers.items():
        _take(layer, config, new, adapter_name, new_name, experts[name])
    copy_further(model, adapter_name, new_name)
    return layers


def check_new(model: PeftModel, adapter_name: str, new_name: str) -> None:
    """Check that an adapter with others of an adapter's experts can be made.

    Args:
        model: A model with the adapter.
        adapter_name: The adapter whose experts are taken.
        new_name: Name of the new one.

    Raises:
        TypeError: The new name is no text.
        ValueError: There is no number of experts to change, an expert is none without the others, the new name is
            taken, or a tensor is not finite.
    """
    config = model.peft_config[adapter_name]
    check_text(new_name, "The new adapter", "new_name")
    if not hasattr(config, "num_experts") or getattr(config, "per_layer", None) is not None:
        raise ValueError(
            f"The experts of the adapter {shown(adapter_name)} are not counted by num_experts alone, so that they "
            "cannot be chosen anew. Adapters on the backbone's own experts, and those with per_layer, keep theirs."
        )
    _check_apart(model, adapter_name)
    if new_name in model.peft_config:
        raise ValueError(f"new_name={shown(new_name)} is an adapter of the model already. Take another name.")
    check_finite_adapter(model, adapter_name, f"new_name={shown(new_name)}")


def _check_apart(model: PeftModel, adapter_name: str) -> None:
    """Refuse adapters whose experts are told apart by their number, or have no rows of their own in every tensor."""
    config = model.peft_config[adapter_name]
    for layer in routed_by_name(model, adapter_name).values():
        parts = [layer.experts[adapter_name], *([layer.router[adapter_name]] if adapter_name in layer.router else [])]
        why = [f"what an expert of {type(own).__name__} is depends on all" for own in parts if not own.separable]
        try:
            if not why:
                expert_dimensions(config, Place.typical(layer.in_features, layer.out_features))
        except ValueError as error:
            why = [str(error).rstrip(".")]
        if why:
            raise ValueError(
                f"The experts of the adapter {shown(adapter_name)} cannot be chosen anew at {shown(layer.place)}: "
                f"{why[0]}. Train an adapter with as many as are wanted."
            )


@contextmanager
def only(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Let one adapter alone be active in a block, which trains what it trained before.

    Args:
        model: A model with the adapter.
        adapter_name: Which adapter.
    """
    tuner: Any = model.base_model
    active, name = list(tuner.active_adapters), model.active_adapter
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(adapter_name)
        yield
    finally:
        model.set_adapter(name)
        tuner.set_adapter(active)
        for parameter, own in trained:
            parameter.requires_grad_(own)


def routed_by_name(model: Any, adapter_name: str) -> dict[str, RoutedLayer]:
    """The layers that hold an adapter, by their full names.

    Args:
        model: A `PeftModel`.
        adapter_name: Which adapter.

    Raises:
        TypeError: The model is none.
        ValueError: No layer holds it.
    """
    check_module(model, "The tool")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {
        name: own for name, own in base.named_modules() if isinstance(own, RoutedLayer) and adapter_name in own.experts
    }
    if not layers:
        known = shown(sorted(getattr(model, "peft_config", {})))
        raise ValueError(f"No layer holds the adapter {shown(adapter_name)}; the model's adapters are {known}.")
    return layers


def deciding_places(layers: Mapping[str, RoutedLayer], adapter_name: str) -> dict[str, str]:
    """Which place decides for each layer: its own, or the first of its block where the decision is shared.

    Args:
        layers: By full name, as `routed_by_name` returns them.
        adapter_name: The adapter that they hold.
    """
    follow = {
        name
        for name, layer in layers.items()
        if adapter_name in layer.router and layer.router[adapter_name].reads == "block"
    }
    leaders = {layer.block: layer.place for name, layer in layers.items() if name not in follow}
    return {name: leaders[layer.block] if name in follow else layer.place for name, layer in layers.items()}


@torch.no_grad()
def _take(layer: RoutedLayer, old: Any, new: Any, old_name: str, new_name: str, experts: Sequence[int]) -> None:
    """Copy what an adapter has of each expert; what counts no experts is copied whole."""
    place = Place.typical(layer.in_features, layer.out_features)
    dimensions = expert_dimensions(new, place)
    for attribute, bank in (("experts", layer.experts), ("router", layer.router)):
        if new_name not in bank:
            continue
        before, after = (dict(bank[name].named_parameters()) for name in (old_name, new_name))
        for name, parameter in after.items():
            source = before[name]
            for dimension in dimensions[attribute, name]:
                rows = _rows(experts, old.num_experts, source.shape[dimension])
                source = torch.where(
                    _mask(rows, source.dim(), dimension, source.device),
                    source.index_select(dimension, torch.tensor(rows, device=source.device).clamp(min=0)),
                    parameter,
                )
            parameter.copy_(source)


def _rows(experts: Sequence[int], count: int, size: int) -> list[int]:
    """Rows of the old tensor, with those at its end that belong to no expert the router decides about."""
    return [*experts, *range(count, size)]


def _mask(rows: Sequence[int], dims: int, dimension: int, device: torch.device) -> torch.Tensor:
    known = torch.tensor([row != NEW for row in rows], device=device)
    return known.view([-1 if own == dimension else 1 for own in range(dims)])
