"""An adapter that routes by task, as a fixed weight for one of its tasks: W = W0 + s sum_e w_e(task) B_e A_e."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..layers import RoutedLayer, routed_layers
from ..messages import shown
from ..routers import Router
from ..types import Routing, TokenContext
from .checks import check_finite_adapter, check_peft_model


class FixedRouter(Router):
    """A router whose decision has been made: the same weights for every token.

    Args:
        in_features: D.
        weights_E: (E,) combine weights.
    """

    mergeable = True

    def __init__(self, in_features: int, weights_E: torch.Tensor) -> None:
        super().__init__(in_features, len(weights_E))
        self.weights_E = weights_E

    def forward(self, x: torch.Tensor, context: TokenContext) -> Routing:
        """Give every token the weights; arguments as in `Router.forward`."""
        rows_TE = self.weights_E.to(x.device).expand(x.shape[0], -1)
        return Routing(weights=rows_TE, experts=None, logits=rows_TE, probs=rows_TE, context=context)


def merge_for_task(model: PeftModel, task: int, adapter_name: str | None = None) -> nn.Module:
    """Merge what an adapter does for one task into the base weights, and take all adapters off.

    Everything is checked first: all layers merge, or none does and the model stays as it was.

    Args:
        model: A model with an adapter whose router reads the task of a sample alone.
        task: The task, as in the batch's column of groups.
        adapter_name: Which adapter; None takes the active one.

    Returns:
        The base model, with merged weights.

    Raises:
        TypeError: The model is no PeftModel.
        ValueError: The adapter is not there, decides by more than the task, has no such task, or stands beside more
            than weights.
    """
    check_peft_model(model, "merge_for_task")
    tuner: Any = model.base_model
    active = list(tuner.active_adapters)
    if adapter_name is None and len(active) > 1:
        raise ValueError(
            f"merge_for_task: {shown(active)} are active; one is merged. Name it, as adapter_name={shown(active[0])}."
        )
    name = model.active_adapter if adapter_name is None else adapter_name
    with decided(model, name, task):
        base: nn.Module = model.merge_and_unload(adapter_names=[name])
    return base


@contextmanager
def decided(model: PeftModel, adapter_name: str, task: int | None = None) -> Iterator[None]:
    """Let routers that decide the same for every token be fixed weights, for the time of a block.

    Places that follow the decision of their block's first one are given its weights; routers that read the tokens
    stay, for the layers to refuse what they cannot merge.

    Args:
        model: A model with the adapter.
        adapter_name: Which adapter.
        task: The task to decide for, as in the batch's column of groups, where all routers must decide by it alone;
            None for an adapter without tasks.

    Raises:
        ValueError: There is no such task, or the adapter is not there, or decides by more than the task.
    """
    layers = [layer for layer in routed_layers(model) if adapter_name in layer.router]
    if not layers and task is not None:
        raise ValueError(
            f"merge_for_task: no layer holds a router of the adapter {shown(adapter_name)}; there are "
            f"{shown(sorted(model.peft_config))}."
        )
    if task is not None and (type(task) is not int or abs(task) >= 2**63):
        raise ValueError(f"merge_for_task: task={shown(task)} must be a whole number, as in the column of groups.")
    check_finite_adapter(model, adapter_name, "merge_for_task" if task is not None else "The export")
    fixed = _decisions(layers, adapter_name, task)
    before = [layer.router[adapter_name] for layer in layers]
    try:
        for layer, own in zip(layers, fixed, strict=True):
            layer.router[adapter_name] = own
        yield
    finally:
        for layer, router in zip(layers, before, strict=True):
            layer.router[adapter_name] = router


@torch.no_grad()
def _decisions(layers: list[RoutedLayer], name: str, task: int | None) -> list[Router]:
    """What the router of each layer decides; places of a block share its first one's decision."""
    context = TokenContext() if task is None else TokenContext(groups=torch.tensor([task]))
    by_block: dict[str | None, torch.Tensor] = {}
    made: list[Router] = []
    for layer in layers:
        router = layer.router[name]
        if router.reads == "block" and layer.block in by_block:
            made.append(FixedRouter(layer.in_features, by_block[layer.block]))
            continue
        if task is None and not (router.mergeable and layer.block is not None):
            made.append(router)
            continue
        if not router.mergeable and router.reads != "groups":
            raise ValueError(
                f"merge_for_task: the adapter {shown(name)} decides by the tokens at {layer.place}, not by the task "
                "alone, so that no fixed weight equals it. Keep it as an adapter."
            )
        by_block[layer.block] = _decided(router, layer.in_features, context)
        made.append(FixedRouter(layer.in_features, by_block[layer.block]))
    return made


def _decided(router: Router, in_features: int, context: TokenContext) -> torch.Tensor:
    """(E,) weights that a router gives a token of zeros, in the precision of its parameters."""
    x_TD = torch.zeros(1, in_features)
    for parameter in router.parameters():
        x_TD = x_TD.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    return router(x_TD, context).gate_matrix()[0]
