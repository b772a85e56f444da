"""Router losses in the gradient of whatever loss the training loop computes.

A trainer's loss need not know about them: where a routing is made, an identity on its weights injects
d(coefficient * loss) into the backward pass. This is right under activation checkpointing of either kind, and silent
outside training passes. `router_loss` gives their sum to a hand-written loop; adding it to the loss, in any scale,
makes that scale the injected one, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .context import ForwardLosses, LayerLosses, find_tracker
from .types import LossScale, Routing

Loss = Callable[[Routing], torch.Tensor]


class RouterObjective:
    """The router losses of one layer.

    Args:
        losses: Name -> (loss, coefficient); a coefficient of zero leaves the loss out.
    """

    def __init__(self, losses: Mapping[str, tuple[Loss, float]]) -> None:
        self.losses = {name: loss for name, (loss, coef) in losses.items() if coef != 0}
        self.coefficients = {name: coef for name, (_, coef) in losses.items() if coef != 0}

    def __bool__(self) -> bool:
        return bool(self.losses)

    def __call__(self, routing: Routing) -> tuple[Routing, LayerLosses]:
        """Compute the losses and inject their gradient.

        Args:
            routing: Decision of a training pass.

        Returns:
            The same decision, whose weights must be used, and the unscaled losses, detached.
        """
        values = {name: loss(routing) for name, loss in self.losses.items()}
        total = sum(self.coefficients[name] * value for name, value in values.items())
        scale = routing.context.loss_scale or LossScale()
        # A training pass without gradients is the first one of reentrant checkpointing; the recomputation attaches.
        scale.attached += int(not torch.is_grad_enabled() or any(v.requires_grad for v in values.values()))
        weights = _InjectLoss.apply(routing.weights, total, scale)
        detached = {name: value.detach() for name, value in values.items()}
        return replace(routing, weights=weights), LayerLosses(detached, self.coefficients)


class _InjectLoss(torch.autograd.Function):
    """Identity on the weights whose backward pass gives the loss its gradient."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, loss: torch.Tensor, scale: LossScale) -> torch.Tensor:
        ctx.scale, ctx.dtype, ctx.device = scale, loss.dtype, loss.device
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        ctx.scale.injected += 1
        return grad, torch.as_tensor(ctx.scale.value, dtype=ctx.dtype, device=ctx.device), None


class _ScaleInjection(torch.autograd.Function):
    """Value of the router losses; its gradient becomes the weight of their injected gradient.

    The engine runs the youngest ready node first, and this one is younger than every node of the forward pass it
    belongs to, so the weight is set before the first loss is injected.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, total: torch.Tensor, scale: LossScale) -> torch.Tensor:
        ctx.scale = scale
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        scale = ctx.scale
        already = scale.injected
        scale.value = grad.detach()

        def check() -> None:
            if scale.attached and scale.injected == already:
                raise RuntimeError(
                    "The gradient of router_loss(model) is lost: it flows through the layers of the model's own "
                    "loss, and this backward pass did not reach them. Add it before the backward pass of the same "
                    "forward: (loss + router_loss(model)).backward()."
                )

        torch.autograd.Variable._execution_engine.queue_callback(check)
        return None, None, None


def router_loss(model: nn.Module) -> torch.Tensor:
    """Sum of coefficient * loss over all layers of the latest training forward.

    A plain loop trains with the router losses without calling this: their gradient is injected with weight one. Call
    it to print their value, or to weigh them in the loop's own way, as in `((loss + router_loss(model)) /
    n).backward()`; the gradient that reaches the returned tensor replaces the weight one.

    Args:
        model: A model with routed adapters, wrapped or not.

    Returns:
        0-d float32 tensor; zero when no layer has a router loss.

    Raises:
        ValueError: The model has no routed adapter.
        RuntimeError: There was no forward in train mode with gradients enabled. In the backward pass: the gradient
            would be lost because the model's own loss is not part of it.
    """
    latest = _latest_losses(model, "router_loss")
    parts = [
        layer.coefficients[name] * value
        for layers in latest.layers.values()
        for layer in layers
        for name, value in layer.values.items()
    ]
    if not parts:
        return torch.zeros(())
    device = parts[-1].device
    total = torch.stack([part.to(device) for part in parts]).sum()
    anchor = torch.zeros((), device=device, requires_grad=True)
    return _ScaleInjection.apply(anchor, total, latest.scale)


def router_loss_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Unscaled router losses of the latest training forward, averaged over the layers that have them.

    Args:
        model: A model with routed adapters, wrapped or not.

    Returns:
        Loss name -> 0-d float32 tensor without gradient.

    Raises:
        ValueError: The model has no routed adapter.
        RuntimeError: There was no forward in train mode with gradients enabled.
    """
    values: dict[str, list[torch.Tensor]] = {}
    for layers in _latest_losses(model, "router_loss_values").layers.values():
        for layer in layers:
            for name, value in layer.values.items():
                values.setdefault(name, []).append(value)
    return {name: torch.stack([v.to(parts[0].device) for v in parts]).mean() for name, parts in values.items()}


def _latest_losses(model: nn.Module, caller: str) -> ForwardLosses:
    tracker = find_tracker(model)
    if tracker is None:
        raise ValueError(f"{caller}: {type(model).__name__} has no routed adapter. Add one with peft.get_peft_model.")
    if tracker.latest is None:
        raise RuntimeError(
            f"{caller}: no training forward has run yet. Router losses exist only after a forward with model.train() "
            "and gradients enabled; for a routing in evaluation use moe_peft.telemetry.record(model)."
        )
    return tracker.latest
