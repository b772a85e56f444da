"""Vectors for routers that take prototypes: what the texts of each expert's task look like, or what experts answer.

    fit_centroids     c_e = mean of the place's input over the valid tokens of expert e's texts
    fit_directions    c_e = the right singular vector of B_e A_e with the largest singular value (Arrow, 2405.11157)

Both change the adapter's tensors, so that it is saved with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..layers import RoutedLayer, routed_layers
from ..messages import shown
from .checks import check_finite_adapter, check_peft_model, listed_batches

Batch = Mapping[str, Any]


@torch.no_grad()
def fit_centroids(model: PeftModel, batches: Mapping[int, Iterable[Batch]], adapter_name: str = "default") -> None:
    """Set each expert's vector to the mean input on its own texts, in the model without its adapters.

    Args:
        model: A model with an adapter whose router takes prototypes.
        batches: Expert -> batches of texts, as keyword arguments of the model: token ids, and the mask of padding.
        adapter_name: Which adapter.

    Raises:
        ValueError: The adapter takes no prototypes, an expert has no texts or is none, or their mean is not finite;
            nothing has been changed.
    """
    layers = _layers(model, adapter_name, "fit_centroids")
    if not isinstance(batches, Mapping):
        raise ValueError(f"fit_centroids: batches={shown(batches)} must be a dict from experts to batches.")
    batches = {expert: listed_batches(own, f"fit_centroids: expert {expert}") for expert, own in batches.items()}
    wanted = set(range(min(layer.router[adapter_name].num_experts for layer in layers)))
    if set(batches) != wanted:
        raise ValueError(
            f"fit_centroids: batches has the experts {shown(sorted(batches, key=str))}, but the adapter has "
            f"{shown(sorted(wanted))}. Give each of them some batches."
        )
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            means = {expert: _means(model, layers, own, expert) for expert, own in batches.items()}
    finally:
        model.train(was_training)
    for number, layer in enumerate(layers):
        weight = layer.router[adapter_name].get_parameter("weight")
        for expert, own in means.items():
            weight[expert] = own[number].to(weight)


@torch.no_grad()
def fit_directions(model: PeftModel, adapter_name: str = "default") -> None:
    """Set each expert's vector to the direction of the input that it answers most.

    Args:
        model: A model with an adapter whose router takes prototypes, and whose experts are trained pairs.
        adapter_name: Which adapter.

    Raises:
        ValueError: The adapter takes no prototypes, or an expert answers nothing yet; nothing has been changed.
    """
    layers = _layers(model, adapter_name, "fit_directions")
    check_finite_adapter(model, adapter_name, "fit_directions")
    found = [layer.experts[adapter_name].directions() for layer in layers]
    for layer, directions_ED in zip(layers, found, strict=True):
        weight = layer.router[adapter_name].get_parameter("weight")
        weight[: len(directions_ED)] = directions_ED.to(weight)


def _layers(model: nn.Module, adapter_name: str, caller: str) -> list[RoutedLayer]:
    check_peft_model(model, caller)
    layers = [layer for layer in routed_layers(model) if adapter_name in layer.router]
    if not layers or not all(layer.router[adapter_name].takes_prototypes for layer in layers):
        raise ValueError(
            f"{caller}: the model has no adapter {shown(adapter_name)} whose router takes a vector for each expert. "
            "Use a scorer that does (takes_prototypes)."
        )
    return layers


def _means(model: nn.Module, layers: list[RoutedLayer], batches: Iterable[Batch], expert: int) -> list[torch.Tensor]:
    """(D,) mean input of each layer over the valid tokens of some batches."""
    sums = [torch.zeros(layer.in_features, dtype=torch.float64) for layer in layers]
    counts = [0] * len(layers)
    mask: torch.Tensor | None = None

    def reader(number: int) -> Any:
        def read(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x_TD = args[0].reshape(-1, args[0].shape[-1])
            if mask is not None and mask.numel() == len(x_TD):
                x_TD = x_TD[mask.reshape(-1).to(x_TD.device) != 0]
            sums[number] += x_TD.double().sum(0).cpu()
            counts[number] += len(x_TD)

        return read

    hooks = [layer.register_forward_pre_hook(reader(number)) for number, layer in enumerate(layers)]
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    means = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    if not all(counts) or not all(bool(torch.isfinite(mean).all()) for mean in means):
        raise ValueError(
            f"fit_centroids: the texts of expert {expert} give no mean: there are none, or their inputs are not "
            "finite."
        )
    return means
