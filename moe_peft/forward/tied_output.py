"""Router losses tied to what a stack returns, for decisions that were made in compiled code.

Compiled code cannot wait for a gradient that is known when the stack's forward has ended. So its decisions pass
unchanged, and the output of the stack goes through an identity whose backward gives them their gradient: it runs
before anything in the stack does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from ..types import LossScale
from .joined_losses import joined_total
from .measurement import Measurement, measure


def tie_graph(calls: Sequence[Measurement], scale: LossScale, join: Callable[[], None], output: Any) -> Any:
    """Tie the losses of compiled calls by their own graph, in compiled code.

    Args:
        calls: All calls of the pass.
        scale: Weight of their gradient.
        join: Joins the sums that the calls have been told.
        output: What the stack returns.

    Returns:
        The output, which carries the gradient.
    """
    stacks = measure(calls, apart=False)
    join()
    parts = [
        part
        for stack in stacks
        for name, sums_PN in stack.sums.items()
        for part in [joined_total([call.losses for call in stack.members], name, sums_PN)]
    ]
    total = torch.stack(parts).sum()
    for call in calls:
        call.routing = None
    tensors = list(differentiable(output))
    if not total.requires_grad or not tensors:
        return output
    scale.graph = total if scale.graph is None else scale.graph + total
    return rebuilt(output, iter(_TieTotal.apply(float(scale.value), total, *tensors)))


def tie(
    calls: Sequence[Measurement], decisions: Sequence[dict[str, torch.Tensor]], scale: LossScale, output: Any
) -> Any:
    """Tie the gradients of calls that compiled code has made.

    Args:
        calls: Compiled calls, whose gradients are known.
        decisions: The tensors of each call's decision by name, as they were left here.
        scale: Weight of the gradients.
        output: What the stack returns.

    Returns:
        The output, which carries the gradients.
    """
    pairs = [
        (own[name], gradient)
        for call, own in zip(calls, decisions, strict=True)
        for name, gradient in (call.gradients or {}).items()
        if own[name].requires_grad
    ]
    tensors = list(differentiable(output))
    if not pairs or not tensors:
        return output
    own, gradients = zip(*pairs, strict=True)
    return rebuilt(output, iter(_TieGradients.apply(scale, gradients, len(tensors), *tensors, *own)))


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of a module's output, however it nests them."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(part)


def differentiable(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of a module's output through which a gradient may come."""
    return (tensor for tensor in tensors_in(output) if tensor.requires_grad)


def rebuilt(output: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """A module's output with other tensors in the places of those that are `differentiable`."""
    if isinstance(output, torch.Tensor):
        return next(tensors) if output.requires_grad else output
    if isinstance(output, MutableMapping):
        for name in list(output):
            output[name] = rebuilt(output[name], tensors)
        return output
    if isinstance(output, tuple):
        parts = [rebuilt(part, tensors) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return [rebuilt(part, tensors) for part in output] if isinstance(output, list) else output


class _TieTotal(torch.autograd.Function):
    """Identity on a stack's output whose backward gives the sum of the losses its weight."""

    @staticmethod
    def forward(ctx: Any, scale: float, total: torch.Tensor, *output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.scale = scale
        ctx.save_for_backward(total)
        return tuple(tensor.view_as(tensor) for tensor in output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        (total,) = ctx.saved_tensors
        return None, torch.full_like(total, ctx.scale), *grads


class _TieGradients(torch.autograd.Function):
    """Identity on a stack's output whose backward gives decisions the gradients of their losses."""

    @staticmethod
    def forward(
        ctx: Any, scale: LossScale, gradients: tuple[torch.Tensor, ...], count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.scale, ctx.gradients = scale, gradients
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        return None, None, None, *grads, *(gradient * ctx.scale.value for gradient in ctx.gradients)


class InjectKnown(torch.autograd.Function):
    """Identity on the weights whose backward gives a decision gradients that are known when it is made again."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*pairs[len(pairs) // 2 :])
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        gradients = ctx.saved_tensors
        return grad, *gradients, *(None for _ in gradients)
