"""The sums of all processes, also where each has called other layers: one order of places that all have agreed on.

A process whose batch has no images calls no layer of an image encoder. Where it has no sums of a place it adds zeros:

    joined sums = sum over the processes that called the place,    m = number of all processes

which is the loss of the joined batch, as the mean of gradients over all processes divides by m. The order is agreed on
in the first forward. As long as a place may still come that it lacks, each forward says so in the same all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import distributed as dist

from ..messages import shown
from .joined_losses import LayerLosses
from .processes import num_processes, sum_over_processes


class Slot(NamedTuple):
    """Where the sums of one loss of one call stand; the same on every process.

    Attributes:
        place: Name of the layer.
        adapter: Name of the adapter.
        call: Number of the call of the layer in a forward.
        scope: What the loss is measured on.
        loss: Name of the loss.
        size: N, number of its sums.
        double: Whether they are float64.
    """

    place: str
    adapter: str
    call: int
    scope: str
    loss: str
    size: int
    double: bool


class SharedSums:
    """Joins the sums of processes that may call different layers of one model.

    Attributes:
        order: The slots that all processes have agreed on, in order; None before they have.
        settled: Whether no place can come that the order lacks, so that forwards need not ask the other processes.
    """

    def __init__(self) -> None:
        self.order: list[Slot] | None = None
        self.settled = False

    def join(
        self, layers: Mapping[tuple[str, str, int], LayerLosses], device: torch.device
    ) -> dict[Slot, torch.Tensor]:
        """Set the joined sums of what this process has called in a forward; every process calls this.

        Args:
            layers: (place, adapter, number of the call) -> losses that are joined over processes.
            device: Where the sums of absent places are made.

        Returns:
            Joined sums of the slots that this process has not called.

        Raises:
            RuntimeError: A layer is called more often than in any forward before, which the others cannot know.
        """
        own = {_slot(key, layer, name): sums for key, layer in layers.items() for name, sums in layer.own.items()}
        if self.order is None and not self.settled:
            self._agree(own)
        joined, lacking = self._add_up(own, device)
        if lacking:
            self._agree(own)
            joined, _ = self._add_up(own, device)
        for key, layer in layers.items():
            layer.count = num_processes()
            for name, sums in layer.own.items():
                layer.joined[name] = joined.pop(_slot(key, layer, name)).to(sums)
        return joined

    def settle(self, places: Mapping[tuple[str, str], bool]) -> None:
        """Note whether a place may still come that the order lacks.

        Args:
            places: (place, adapter) of all that may be called -> whether the number of calls depends on the batch.
        """
        order = self.order or []
        known = {(slot.place, slot.adapter) for slot in order}
        once = all(slot.call == 0 for slot in order)
        self.settled = once and known >= places.keys() and not any(places.values())

    def _add_up(self, own: Mapping[Slot, torch.Tensor], device: torch.device) -> tuple[dict[Slot, torch.Tensor], bool]:
        """The sums of all slots, and whether a process has one that the order lacks; a settled order is not asked."""
        order = self.order or []
        unknown = sorted(own.keys() - set(order))
        if self.settled and unknown:
            raise RuntimeError(
                f"{shown(unknown[0].place)} is called {unknown[0].call + 1} times in one forward, more often than in "
                "any before, so that other processes do not join its router losses. Set "
                "load_balancing_scope='micro_batch', or call it equally often in every forward."
            )
        tensors = [own[slot] if slot in own else _zeros(slot, device) for slot in order]
        if self.settled:
            return dict(zip(order, sum_over_processes(tensors), strict=True)), False
        *summed, lacking = sum_over_processes([*tensors, torch.tensor([float(bool(unknown))], device=device)])
        return dict(zip(order, summed, strict=True)), float(lacking) > 0

    def _agree(self, own: Mapping[Slot, torch.Tensor]) -> None:
        """Order the slots that any process has."""
        told: list[list[Slot]] = [[] for _ in range(num_processes())]
        dist.all_gather_object(told, sorted(own))
        self.order = sorted({*(self.order or []), *(slot for slots in told for slot in slots)})


def _zeros(slot: Slot, device: torch.device) -> torch.Tensor:
    return torch.zeros(slot.size, device=device, dtype=torch.float64 if slot.double else torch.float32)


def _slot(key: tuple[str, str, int], layer: LayerLosses, name: str) -> Slot:
    own = layer.own[name]
    return Slot(*key, layer.scope, name, own.numel(), own.dtype == torch.float64)
