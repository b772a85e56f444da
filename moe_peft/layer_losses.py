"""The router losses of a forward pass: each layer's sums, joined over the batch they are measured on.

A loss is a function of sums (`RouterLoss`). When the forward of a stack ends, the sums of all its layers are joined,
with one all-reduce where there are several processes, and the derivative of every loss in its own sums is known:

    d loss / d own sums = m * value'(joined sums)      m: number of sums that were joined

The mean over processes, which is what they do with gradients, then is the gradient of the loss of the joined batch
(Demons in the Detail, arXiv 2501.11873), and the mean over micro-batches that of the accumulation window so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed as dist

from .types import LossScale, RouterLoss

SCOPES = ("micro_batch", "global_batch", "accumulation_window")


@dataclass
class LayerLosses:
    """The router losses of one layer in one pass.

    Attributes:
        losses: The losses by name.
        coefficients: Their coefficients in this pass.
        scope: What the losses are measured on, out of `SCOPES`.
        own: Name -> (N,) sums of this pass and process, without graph.
        joined: Name -> (N,) sums of everything the scope covers.
        count: m, the number of sums that were joined.
        gradients: Name -> (N,) derivative of coefficient * loss in its own sums; empty until the stack's forward ends.
    """

    losses: Mapping[str, RouterLoss]
    coefficients: dict[str, float]
    scope: str
    own: dict[str, torch.Tensor]
    joined: dict[str, torch.Tensor] = field(default_factory=dict)
    count: int = 1
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """Unscaled 0-d losses of the joined sums, by name, without graph."""
        return {name: self.losses[name].value(sums) for name, sums in (self.joined or self.own).items()}


@dataclass
class ForwardLosses:
    """The router losses of one forward of the whole model, encoder and decoder together.

    Attributes:
        scale: Weight of their injected gradient.
        layers: What each (place, adapter) contributed, in order.
    """

    scale: LossScale
    layers: dict[tuple[str, str], list[LayerLosses]] = field(default_factory=dict)


class WindowSums:
    """Joined sums of the micro-batches of an accumulation window so far, per layer and loss."""

    def __init__(self) -> None:
        self.sums: dict[tuple, torch.Tensor] = {}
        self.counts: dict[tuple, int] = {}

    def add(self, key: tuple, layer: LayerLosses) -> None:
        """Join a layer's sums with those of the window's earlier micro-batches."""
        for name, sums in layer.joined.items():
            before = self.sums.get((*key, name))
            layer.joined[name] = self.sums[(*key, name)] = sums if before is None else before + sums
        layer.count += self.counts.get(key, 0)
        self.counts[key] = layer.count


def finish(layers: Mapping[tuple, LayerLosses], window: WindowSums | None) -> None:
    """Join the sums of the layers that a stack's forward ran, and differentiate their losses.

    Args:
        layers: (place, adapter, number of the call) -> losses; the same keys in the same order on every process.
        window: The accumulation window; None outside one.
    """
    for layer in layers.values():
        layer.joined = dict(layer.own)
    _join_processes([layer for layer in layers.values() if layer.scope != "micro_batch"])
    for key, layer in layers.items():
        if window is not None and layer.scope == "accumulation_window":
            window.add(key, layer)
    differentiate(list(layers.values()))


def _join_processes(layers: Sequence[LayerLosses]) -> None:
    if not layers or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    own = [sums for layer in layers for sums in layer.own.values()]
    dtype = torch.float64 if any(sums.dtype == torch.float64 for sums in own) else torch.float32
    flat = torch.cat([sums.to(own[0].device, dtype) for sums in own])
    dist.all_reduce(flat)
    parts = iter(flat.split([sums.numel() for sums in own]))
    for layer in layers:
        layer.joined = {name: next(parts).to(sums) for name, sums in layer.own.items()}
        layer.count = dist.get_world_size()


def differentiate(layers: Sequence[LayerLosses]) -> None:
    """Set the gradients of layers whose sums are joined; losses of one kind and size in a single pass.

    Args:
        layers: Layers of one process.
    """
    groups: dict[tuple, list[tuple[LayerLosses, str]]] = {}
    for layer in layers:
        for name, sums in layer.joined.items():
            kind = (type(layer.losses[name]), sums.shape, sums.dtype, sums.device)
            groups.setdefault(kind, []).append((layer, name))
    for (loss, *_), members in groups.items():
        gradients_GN = _derivative(loss, torch.stack([layer.joined[name] for layer, name in members]))
        weights_G = [layer.coefficients[name] * layer.count for layer, name in members]
        if len(set(weights_G)) == 1:
            gradients_GN = gradients_GN * weights_G[0]
        else:
            gradients_GN = gradients_GN * gradients_GN.new_tensor(weights_G)[:, None]
        for (layer, name), gradient_N in zip(members, gradients_GN, strict=True):
            layer.gradients[name] = gradient_N


def _derivative(loss: Any, sums_GN: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf_GN = sums_GN.clone().requires_grad_()
        (gradients_GN,) = torch.autograd.grad(loss.value(leaf_GN).sum(), leaf_GN)
    return gradients_GN
