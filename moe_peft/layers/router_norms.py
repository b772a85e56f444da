"""How long the vector is by which a router knows each expert: how much it has changed says how much was learned there.

    n_e = ||w_e||_2        change_e = n_e(trained) - n_e(start)

Experts of the smallest change matter least to the task (Chowdhury et al., arXiv 2405.16646). The start is random, so
that its lengths have to be kept.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..backbone.partitioned import gathered
from ..config.expert_dimensions import expert_dimensions
from ..messages import shown
from ..place import Place
from .find import routed_layers
from .routed_layer import RoutedLayer


@torch.no_grad()
def router_norms(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Measure the vectors of each expert in the routers of an adapter.

    Every process must call it where weights are split.

    Args:
        model: A model with the adapter, wrapped or not.
        adapter_name: Which adapter.

    Returns:
        Place -> (E,) float64 lengths, of all that a router trains for an expert. Places whose router has no numbers
        for each expert are left out.

    Raises:
        TypeError: The model is none.
        ValueError: No layer holds the adapter.
    """
    layers = [layer for layer in routed_layers(model) if adapter_name in layer.experts]
    if not layers:
        known = sorted({name for layer in routed_layers(model) for name in layer.experts})
        raise ValueError(f"No layer holds the adapter {shown(adapter_name)}; the model's adapters are {shown(known)}.")
    config = next(
        configs[adapter_name]
        for module in model.modules()
        if adapter_name in (configs := getattr(module, "peft_config", None) or {})
    )
    found = {}
    for layer in layers:
        if adapter_name in layer.router and hasattr(config, "num_experts"):
            lengths_E = _lengths(layer, adapter_name, config)
            if lengths_E is not None:
                found[layer.place] = lengths_E
    return found


def _lengths(layer: RoutedLayer, adapter_name: str, config: Any) -> torch.Tensor | None:
    own = dataclasses.replace(config, per_layer=None) if getattr(config, "per_layer", None) else config
    try:
        dimensions = expert_dimensions(own, Place.typical(layer.in_features, layer.out_features))
    except ValueError:  # parts of which another number of experts cannot be made
        return None
    router, num_experts = layer.router[adapter_name], layer.experts[adapter_name].num_choices
    if not type(router).separable:
        return None
    with ExitStack() as whole:
        for module in router.modules():
            whole.enter_context(gathered(module))
        return _measured(router, dimensions, num_experts)


def _measured(router: Any, dimensions: dict[tuple[str, str], list[int]], num_experts: int) -> torch.Tensor | None:
    """Lengths over all of a router's trained tensors with a dimension of experts; None where one is not whole."""
    squares_E = torch.zeros(num_experts, dtype=torch.float64)
    counted = False
    for name, parameter in router.named_parameters():
        counting = dimensions.get(("router", name), [])
        if name in router.frozen or not counting:
            continue
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if tensor.dim() <= counting[0] or tensor.shape[counting[0]] < num_experts:
            return None  # a part of a tensor, which another library has split
        others = tensor.detach().double().cpu().movedim(counting[0], 0)[:num_experts]
        squares_E += others.reshape(num_experts, -1).square().sum(1)
        counted = True
    return squares_E.sqrt() if counted else None
