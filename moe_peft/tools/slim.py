"""A trained adapter with fewer, or more, experts for each token while a context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..integrations.values import get_value, known_values, parts_with, set_value
from ..layers import routed_layers
from ..messages import shown


@contextmanager
def slim(model: nn.Module, *, top_k: int) -> Iterator[None]:
    """Let every token use `top_k` experts within a `with` block.

    Adapters that were trained with a growing k under a fixed random router (SMoE-Dropout, arXiv 2303.01610) lose
    little with fewer; others may lose much, which only a test set tells.

    Args:
        model: A model with routed adapters, all of which are set.
        top_k: Experts of a token, from 1 to the number of experts.

    Raises:
        ValueError: No selector keeps a number of experts, or `top_k` is out of range at a layer.
    """
    selectors = parts_with(model, "top_k")
    if not selectors:
        raise ValueError(f"slim: no router of the model has a top_k; what may change is {shown(known_values(model))}.")
    routers = [router for layer in routed_layers(model) for router in layer.router.values()]
    fewest = min(router.num_experts for router in routers if router.select in selectors)
    if type(top_k) is not int or not 1 <= top_k <= fewest:
        raise ValueError(
            f"slim: top_k={shown(top_k)} must be a whole number from 1 to {fewest}, the experts of a layer."
        )
    before = [get_value(selector, "top_k") for selector in selectors]
    for selector in selectors:
        set_value(selector, "top_k", top_k)
    try:
        yield
    finally:
        for selector, value in zip(selectors, before, strict=True):
            set_value(selector, "top_k", value)
