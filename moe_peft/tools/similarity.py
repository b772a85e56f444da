"""How alike the experts of an adapter are: the cosine of what each pair of them adds.

    cos(e, f) = <D_e, D_f> / sqrt(<D_e, D_e> <D_f, D_f>)

D_e is the matrix that expert e adds to its place. The inner products come from the factors, so that no such matrix is
built (the comparison of experts is that of Lo et al., arXiv 2406.18219).
"""

from __future__ import annotations

import torch
from torch import nn

from ..layers import routed_layers
from ..messages import shown
from .checks import check_finite_adapter


def delta_similarity(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Compare the experts of an adapter with each other at every place.

    Args:
        model: A model with routed adapters, wrapped or not.
        adapter_name: Which adapter.

    Returns:
        Place -> (E, E) float64 cosines in [-1, 1]; NaN beside experts that add nothing, as before training. Experts of
        a kind whose additions are no matrices, and copies that are merged, are left out. An adapter of some experts of
        the backbone has rows for these alone, in ascending order.

    Raises:
        TypeError: The model is no module.
        ValueError: It has no such adapter, or one with tensors that are not finite, which are named.
    """
    layers = [layer for layer in routed_layers(model) if adapter_name in layer.experts]
    if not layers:
        names = sorted({name for layer in routed_layers(model) for name in layer.experts})
        raise ValueError(
            f"delta_similarity: the model has no routed adapter {shown(adapter_name)}; it has {shown(names)}. Name "
            "one of them, or add one with peft.get_peft_model."
        )
    check_finite_adapter(model, adapter_name, "delta_similarity")
    found = {layer.place: layer.delta_products(adapter_name) for layer in layers}
    return {place: cosines(products) for place, products in found.items() if products is not None}


def cosines(products: torch.Tensor) -> torch.Tensor:
    """Turn inner products into cosines.

    Args:
        products: (E, E), positive semidefinite.

    Returns:
        (E, E) float64 on the CPU; NaN in the rows and columns of zeros.
    """
    products = products.double().cpu()
    lengths_E = products.diagonal().clamp_min(0).sqrt()
    lengths_E = lengths_E.masked_fill(lengths_E == 0, float("nan"))
    return (products / lengths_E[:, None] / lengths_E).clamp(-1, 1)
