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

from ..messages import shown
from ..types import LossScale, RouterLoss, Routing
from .find import find_trackers
from .joined_losses import ForwardLosses, LayerLosses, mean_values
from .measurement import Measurement, tensors_of
from .tied_output import InjectKnown
from .tracker import ForwardTracker

Loss = Callable[[Routing], torch.Tensor]


class MeanLoss(RouterLoss):
    """Any function of a routing as a loss; over several processes or micro-batches it is the mean of their values.

    Args:
        loss: Function of a routing that returns a 0-d tensor.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def sums(self, routing: Routing) -> torch.Tensor:
        """(2,) value of the loss, and one."""
        value = self.loss(routing)
        return torch.stack([value, torch.ones_like(value)])

    @staticmethod
    def value(sums: torch.Tensor) -> torch.Tensor:
        """(...) mean of (..., 2) sums."""
        return sums[..., 0] / sums[..., 1]


class RouterObjective:
    """The router losses of one layer.

    Args:
        losses: Name -> (loss, coefficient); a coefficient of zero leaves the loss out.
        scope: What the losses are measured on: "micro_batch", "global_batch" or "accumulation_window".
    """

    def __init__(self, losses: Mapping[str, tuple[Loss, float]], *, scope: str = "global_batch") -> None:
        kept = {name: (loss, coef) for name, (loss, coef) in losses.items() if coef != 0}
        self.losses = {n: loss if isinstance(loss, RouterLoss) else MeanLoss(loss) for n, (loss, _) in kept.items()}
        self.coefficients = {name: coef for name, (_, coef) in kept.items()}
        self.scope = scope

    def __bool__(self) -> bool:
        return bool(self.losses)

    @property
    def adapts(self) -> bool:
        """Whether the coefficient of a loss follows what the routers decide."""
        return any(loss.adapts for loss in self.losses.values())

    def __call__(self, routing: Routing, tracker: ForwardTracker, place: str, adapter: str) -> Routing:
        """Measure the losses and inject their gradient.

        Args:
            routing: Decision of a training pass.
            tracker: The model's tracker, which joins the measurement with that of other processes.
            place: Name of the layer.
            adapter: Name of the adapter.

        Returns:
            The same decision, whose weights must be used.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError(
                f"{place}: router losses put their gradient into the backward pass of autograd, which torch.func's "
                "transforms (grad, vmap, jvp) do not run. Use loss.backward() or torch.autograd.grad, evaluate the "
                "model (model.eval()), or set the coefficients of the router losses to 0."
            )
        context = routing.context
        if not context.padding_known:
            raise ValueError(
                f"{place}: its rows have another length than the attention mask, so that router losses would count "
                "the padding. Leave the place out of target_modules, give batches without padding (no attention_mask, "
                "or one of ones), or set the coefficients of the router losses to 0."
            )
        layer = LayerLosses(
            self.losses, dict(self.coefficients), self.scope, part=context.part, assumed=context.assumed
        )
        call = Measurement(layer, routing, tied=compiling)
        measured = tracker.enter(place, adapter, call)
        others = (routing.probs, routing.logits, *routing.extras.values())
        scale = context.loss_scale or LossScale()
        # A training pass without gradients is the first one of reentrant checkpointing; the recomputation attaches.
        differentiable = routing.weights.requires_grad or any(own.requires_grad for own in others)
        scale.attached += int(differentiable or not torch.is_grad_enabled())
        if compiling:
            return routing if measured is call or measured.tied else _inject_known(routing, measured, scale)
        names = ("probs", "logits", *(f"extras.{name}" for name in routing.extras))
        return routing.with_weights(_InjectLosses.apply(routing.weights, measured, scale, names, *others))


def _inject_known(routing: Routing, measured: Measurement, scale: LossScale) -> Routing:
    """Inject gradients that are known already, in compiled code that repeats a decision."""
    own = tensors_of(routing)
    pairs = [(own[name], gradient * scale.value) for name, gradient in (measured.gradients or {}).items()]
    if not pairs:
        return routing
    tensors, gradients = zip(*pairs, strict=True)
    return replace(routing, weights=InjectKnown.apply(routing.weights, *tensors, *gradients))


class _InjectLosses(torch.autograd.Function):
    """Identity on the weights whose backward pass gives a decision the gradient of its losses."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        measured: Measurement,
        scale: LossScale,
        names: tuple[str, ...],
        *others: torch.Tensor,
    ) -> torch.Tensor:
        ctx.measured, ctx.scale, ctx.names = measured, scale, names
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        # The engine turns gradients on in a backward pass whose own graph is kept.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ValueError(
                "Router losses put their gradient into every backward pass of a forward, of which create_graph=True "
                "makes two. Take second derivatives of the model in evaluation (model.eval()), or set the "
                "coefficients of the router losses to 0."
            )
        gradients, scale = ctx.measured.gradients, ctx.scale.value
        if gradients is None:
            raise RuntimeError(
                "A backward pass reached a routed layer before the forward of its model had ended, so its router "
                "losses are not known. Call backward() behind the model's forward."
            )
        weights = gradients.get("weights")
        injected = [gradients.get(name) for name in ctx.names]
        if not isinstance(scale, float) or scale != 1.0:
            weights = None if weights is None else weights * scale
            injected = [None if own is None else own * scale for own in injected]
        return grad if weights is None else grad + weights, None, None, None, *injected


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
        already = scale.reached
        scale.value, scale.replaced = grad.detach(), True

        def check() -> None:
            if scale.attached and scale.watched and scale.reached == already:
                raise RuntimeError(
                    "The gradient of router_loss(model) is lost: it flows through the layers of the model's own "
                    "loss, and this backward pass did not reach them. Add it before the backward pass of the same "
                    "forward: (loss + router_loss(model)).backward()."
                )

        torch.autograd.Variable._execution_engine.queue_callback(check)
        return None, None, None


class _WeighCompiled(torch.autograd.Function):
    """Value of losses that compiled code injects with a fixed weight; the gradient of it replaces that weight."""

    @staticmethod
    def forward(ctx: Any, graph: torch.Tensor, total: torch.Tensor, scale: LossScale) -> torch.Tensor:
        ctx.scale = scale
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad - ctx.scale.value, None, None


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
        TypeError: The model is no module.
        ValueError: The model has no routed adapter.
        RuntimeError: There was no forward in train mode with gradients enabled. In the backward pass: the gradient
            would be lost because the model's own loss is not part of it.
    """
    parts = []
    for latest in _latest_losses(model, "router_loss"):
        total = latest.total()
        if total is not None and latest.scale.graph is not None:
            parts.append(_WeighCompiled.apply(latest.scale.graph, total, latest.scale))
        elif total is not None:
            anchor = torch.zeros((), device=total.device, requires_grad=True)
            parts.append(_ScaleInjection.apply(anchor, total, latest.scale))
    if not parts:
        return torch.zeros(())
    return parts[0] if len(parts) == 1 else torch.stack([part.to(parts[0].device) for part in parts]).sum()


def router_loss_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Unscaled router losses of the latest training forward, averaged over the layers that have them.

    Args:
        model: A model with routed adapters, wrapped or not.

    Returns:
        Loss name -> 0-d float32 tensor without gradient.

    Raises:
        TypeError: The model is no module.
        ValueError: The model has no routed adapter.
        RuntimeError: There was no forward in train mode with gradients enabled.
    """
    return mean_values(
        [layer for latest in _latest_losses(model, "router_loss_values") for layer in latest.all_layers()]
    )


def _latest_losses(model: nn.Module, caller: str) -> list[ForwardLosses]:
    """Losses of the latest training forward of every adapted model in a tree of modules."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: the model must be a torch.nn.Module, not {shown(model)}.")
    trackers = find_trackers(model)
    if not trackers:
        raise ValueError(f"{caller}: {type(model).__name__} has no routed adapter. Add one with peft.get_peft_model.")
    latest = [tracker.latest for tracker in trackers if tracker.latest is not None]
    if not latest:
        raise RuntimeError(
            f"{caller}: no training forward has run yet. Router losses exist only after a forward with model.train() "
            "and gradients enabled; for a routing in evaluation use moe_peft.telemetry.record(model)."
        )
    return latest
