"""The router losses of a forward pass: each layer's sums, joined over the batch they are measured on.

A loss is a function of sums (`RouterLoss`). When the forward of a stack ends, the sums of all its layers are joined,
with one all-reduce where there are several processes, and the derivative of every loss in its own sums is known:

    d loss / d own sums = m * value'(joined sums)      m: number of sums that were joined

The mean over processes, which is what they do with gradients, then is the gradient of the loss of the joined batch
(Demons in the Detail, arXiv 2501.11873), and the mean over micro-batches that of the accumulation window so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..types import LossScale, RouterLoss
from .processes import num_processes, sum_over_processes

SCOPES = ("micro_batch", "global_batch", "accumulation_window")


@dataclass
class LayerLosses:
    """The router losses of one layer in one pass.

    Attributes:
        losses: The losses by name.
        coefficients: Their coefficients in this pass.
        scope: What the losses are measured on, out of `SCOPES`.
        own: Name -> (N,) sums of this pass and process, without graph; empty until the stack's forward ends.
        joined: Name -> (N,) sums of everything the scope covers.
        count: m, the number of sums that were joined; a 0-d tensor where compiled code has counted.
        gradients: Name -> (N,) derivative of coefficient * loss in its own sums; empty until the stack's forward ends.
        part: Tokens that were measured, where they are a slice of the rows; else 0.
        assumed: See `TokenContext.assumed`.
        flat: Whether a slice is of the flattened rows.
    """

    losses: Mapping[str, RouterLoss]
    coefficients: dict[str, float]
    scope: str
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    joined: dict[str, torch.Tensor] = field(default_factory=dict)
    count: int | torch.Tensor = 1
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    part: int = 0
    assumed: bool = False
    flat: bool = False


@dataclass
class ForwardLosses:
    """The router losses of one forward of the whole model, encoder and decoder together.

    Attributes:
        scale: Weight of their injected gradient.
        layers: What each (place, adapter) contributed, in order.
    """

    scale: LossScale
    layers: dict[tuple[str, str], list[LayerLosses]] = field(default_factory=dict)

    def all_layers(self) -> list[LayerLosses]:
        """What all layers contributed, in order."""
        return [layer for made in self.layers.values() for layer in made]

    def mean_values(self) -> dict[str, torch.Tensor]:
        """Unscaled losses averaged over the layers that have them: name -> 0-d tensor without graph."""
        return mean_values(self.all_layers())

    def total(self) -> torch.Tensor | None:
        """0-d sum of coefficient * loss over all layers, without graph; None without any loss."""
        parts = []
        for (loss, *_), members in _alike(self.all_layers()).items():
            values_G = loss.value(torch.stack([layer.joined[name] for layer, name in members]))
            weights_G = values_G.new_tensor([layer.coefficients[name] for layer, name in members])
            parts.append((values_G * weights_G).sum())
        return torch.stack([part.to(parts[0]) for part in parts]).sum() if parts else None


def mean_values(layers: Sequence[LayerLosses]) -> dict[str, torch.Tensor]:
    """Unscaled losses averaged over the layers that have them: name -> 0-d tensor without graph."""
    values: dict[str, list[torch.Tensor]] = {}
    for (loss, *_), members in _alike(layers).items():
        values_G = loss.value(torch.stack([layer.joined[name] for layer, name in members]))
        names = {name for _, name in members}
        if len(names) == 1:
            values.setdefault(names.pop(), []).append(values_G)
            continue
        for (_, name), value in zip(members, values_G, strict=True):
            values.setdefault(name, []).append(value[None])
    return {name: torch.cat([v.to(parts[0]) for v in parts]).mean() for name, parts in values.items()}


class WindowSums:
    """Joined sums of the micro-batches of an accumulation window so far, per layer and loss."""

    def __init__(self) -> None:
        self.sums: dict[tuple, torch.Tensor] = {}
        self.counts: dict[tuple, int | torch.Tensor] = {}

    def add(self, key: tuple, layer: LayerLosses) -> None:
        """Join a layer's sums with those of the window's earlier micro-batches."""
        for name, sums in layer.joined.items():
            layer.joined[name] = self._added(key, name, sums)
        before = self.counts.get(key)
        if before is not None:
            layer.count = layer.count + before
        count = layer.count
        # Every number that a graph reads is one more graph.
        compiles = torch.compiler.is_compiling() and not isinstance(count, torch.Tensor)
        self.counts[key] = torch.tensor(count) if compiles else count

    def add_absent(self, key: tuple, sums: Mapping[str, torch.Tensor], count: int) -> None:
        """Note what other processes have measured at a layer that this one has not called.

        Args:
            key: Of the layer and its call.
            sums: Name of a loss -> (N,) joined sums.
            count: Number of processes.
        """
        for name, own in sums.items():
            self._added(key, name, own)
        self.counts[key] = self.counts.get(key, 0) + count

    def _added(self, key: tuple, name: str, sums: torch.Tensor) -> torch.Tensor:
        before = self.sums.get((*key, name))
        self.sums[(*key, name)] = added = sums if before is None else before + sums
        return added


Joined = Mapping[tuple, LayerLosses]


def finish(
    layers: Joined,
    window: WindowSums | None,
    *,
    derive: bool = True,
    join: Callable[[Joined], None] | None = None,
) -> None:
    """Join the sums of the layers that a stack's forward ran, and differentiate their losses.

    Args:
        layers: (place, adapter, number of the call) -> losses.
        window: The accumulation window; None outside one.
        derive: Whether to differentiate them; else their sums are joined alone.
        join: Joins those that are not of this process alone with the other processes; None where all processes have
            the same keys in the same order.
    """
    for layer in layers.values():
        layer.joined = dict(layer.own)
    (join or _join_processes)({key: layer for key, layer in layers.items() if layer.scope != "micro_batch"})
    for key, layer in layers.items():
        if window is not None and layer.scope == "accumulation_window":
            window.add(key, layer)
    if derive:
        differentiate(list(layers.values()))


def _join_processes(layers: Joined) -> None:
    joined = iter(sum_over_processes([sums for layer in layers.values() for sums in layer.own.values()]))
    for layer in layers.values():
        layer.joined = {name: next(joined) for name in layer.own}
        layer.count = num_processes()


def differentiate(layers: Sequence[LayerLosses]) -> None:
    """Set the gradients of layers whose sums are joined; losses of one kind and size in a single pass.

    Args:
        layers: Layers of one process.
    """
    for (loss, *_), members in _alike(layers).items():
        gradients_GN = _derivative(loss, torch.stack([layer.joined[name] for layer, name in members]))
        weights_G = [layer.coefficients[name] * layer.count for layer, name in members]
        if len(set(weights_G)) == 1:
            gradients_GN = gradients_GN * weights_G[0]
        else:
            gradients_GN = gradients_GN * gradients_GN.new_tensor(weights_G)[:, None]
        for (layer, name), gradient_N in zip(members, gradients_GN, strict=True):
            layer.gradients[name] = gradient_N


def joined_total(layers: Sequence[LayerLosses], name: str, sums_PN: torch.Tensor) -> torch.Tensor:
    """One loss of several layers, whose gradient in their own sums is that of `differentiate`.

    Args:
        layers: P layers of one process, whose sums are joined.
        name: Name of the loss.
        sums_PN: (P, N) own sums, with their graph.

    Returns:
        0-d sum of coefficient * m * loss of the joined sums.
    """
    joined_PN = torch.stack([layer.joined[name] for layer in layers])
    values_P = type(layers[0].losses[name]).value(sums_PN + (joined_PN - sums_PN.detach()))
    weights = [layer.coefficients[name] * layer.count for layer in layers]
    return torch.stack([value * weight for value, weight in zip(values_P.unbind(), weights, strict=True)]).sum()


def _alike(layers: Sequence[LayerLosses]) -> dict[tuple, list[tuple[LayerLosses, str]]]:
    """(layer, name of the loss) of losses that one call can evaluate: of the same class, size, dtype and device."""
    groups: dict[tuple, list[tuple[LayerLosses, str]]] = {}
    for layer in layers:
        for name, sums in layer.joined.items():
            kind = (type(layer.losses[name]), sums.shape, sums.dtype, sums.device)
            groups.setdefault(kind, []).append((layer, name))
    return groups


def _derivative(loss: Any, sums_GN: torch.Tensor) -> torch.Tensor:
    # A checkpoint around the model would miss in its recomputation what is saved here.
    own_saving = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    with torch.inference_mode(False), torch.enable_grad(), own_saving:
        leaf_GN = sums_GN.clone().requires_grad_()
        (gradients_GN,) = torch.autograd.grad(loss.value(leaf_GN).sum(), leaf_GN)
    return gradients_GN
