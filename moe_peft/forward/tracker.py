"""What a model's forward pass knows besides x: gradient mode, padding, packed documents, sample groups.

Entries at the Hugging Face model and at its backbone (encoder and decoder where there are two) open and close calls,
which stand in a stack, one for each thread; the routed layers ask the tracker for the innermost. Layers never look at
`self.training` (generation inside a training loop runs in train mode) nor at `torch.is_grad_enabled()` (the first pass
of reentrant checkpointing runs without gradient). In a recomputation, which runs inside the backward pass, the
original forward's context serves: the autograd node that made a stack's output says whose backward pass has begun.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..place import Rows
from ..types import Routing, TokenContext
from .entry import ModuleEntry
from .find import ENTRIES_ATTRIBUTE, TRACKER_ATTRIBUTE, find_stacks, find_tracker, find_trackers
from .forward_pass import ForwardPass
from .frozen import FrozenTensors
from .measurement import Measurement
from .pass_losses import finish_compiled, finish_pass, finish_together, repeated_call
from .recomputation import NO_TASK, in_backward
from .requests import Requests
from .shared_sums import SharedSums
from .thread_state import Observer
from .tied_output import tensors_in
from .warnings_once import LAST_SEEN, OUTSIDE, WarningKeeper

__all__ = ["TRACKER_ATTRIBUTE", "ForwardTracker", "find_stacks", "find_tracker", "find_trackers", "in_backward"]

INFERENCE = TokenContext()

TRANSIENT: tuple[str, ...] = ("in_reverse", "_thread", "_latest", "_reached", "_busy", "counted", "shared")
TRANSIENT += ("frozen", "in_charge", "_looked_for_parts", *LAST_SEEN)

# (place, adapter) of the router losses that a call of a module may join with other processes -> whether the number of
# calls depends on the batch.
JoinedPlaces = Callable[[nn.Module, "ForwardTracker"], Mapping[tuple[str, str], bool]]


class ForwardTracker(Requests, WarningKeeper):
    """Opens and closes the forward passes of one model, for all routed layers of all its adapters.

    Attributes:
        counted: (place, adapter) -> sums of the training decisions since the last `after_step`, of layers that ask.
        in_charge: Called before a forward while `managed`; ends that where training has ended without telling.
        adapters: Names of the model's routed adapters in the order in which they came, the keys of a dict.
        shared: Joins the router losses of several processes.
        frozen: Freezes what parts never train.
        turning: Names of the places whose parent turns its input around, so that positions come first.

    Args:
        joined_places: Tells the places that a call of a module may reach.
    """

    def __init__(self, joined_places: JoinedPlaces) -> None:
        super().__init__()
        self.joined_places = joined_places
        self.turning: set[str] = set()
        self.adapters: dict[str, None] = {}
        self.training_observers: list[Observer] = []

    def _forget(self) -> None:
        super()._forget()
        self.counted: dict[tuple[str, str], list[torch.Tensor]] = {}
        self.shared = SharedSums()
        self.frozen = FrozenTensors()
        self.in_charge: Callable[[], None] | None = None
        self._looked_for_parts = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave past passes, and what belongs to threads, out of copies and pickles."""
        kept = {name: value for name, value in self.__dict__.items() if name not in TRANSIENT}
        return {**kept, "window": None, "training_observers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which has seen no pass."""
        self.__dict__.update(state)
        self._forget()

    def attach(self, model: nn.Module) -> None:
        """Stand at the entry of the model (sample groups) and of each stack of it (mask, packing, gradient mode)."""
        stacks = find_stacks(model)
        modules = [model, *(stack for stack in stacks if stack is not model)]
        entries = [
            ModuleEntry(self, module, is_model=module is model, is_stack=any(module is stack for stack in stacks))
            for module in modules
        ]
        setattr(model, TRACKER_ATTRIBUTE, self)
        # On the model, as layers hold the tracker and a copy of a layer alone has no entries to remove.
        setattr(model, ENTRIES_ATTRIBUTE, entries)

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""
        for entry in model.__dict__.pop(ENTRIES_ATTRIBUTE, []):
            entry.remove()
        model.__dict__.pop(TRACKER_ATTRIBUTE, None)

    def tokens(
        self,
        x: torch.Tensor,
        rows: Rows = "tokens",
        in_training: bool = False,
        place: str | None = None,
        turned: bool | None = None,
    ) -> TokenContext:
        """Describe the tokens of a layer's input.

        Args:
            x: (..., D) input.
            rows: What the rows of x are.
            in_training: Whether the layer is in train mode, which outside a forward of the model is worth a warning.
            place: Name of the layer; None for one that has asked about this input before.
            turned: Whether x has positions first; None for what the stack tells.
        """
        thread = self._thread
        innermost = thread.calls[-1] if thread.calls else None
        if innermost is not None and not (innermost.training or thread.observers or self.needs):
            task = NO_TASK if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
            if innermost.task == task:
                return INFERENCE
        forward_pass, recomputing = self.asked()
        if forward_pass is None and in_training and not recomputing and torch.is_grad_enabled():
            self._warn_once(OUTSIDE)
        if forward_pass is None or not (forward_pass.training or self._thread.observers or self.needs):
            return INFERENCE
        leading = tuple(x.shape[:-1])
        if rows in ("positions", "tokens_and_positions"):
            if rows == "positions" or forward_pass.later_rows(leading, place or ""):
                return forward_pass.positions()
            rows = "tokens"
        if rows == "tokens" and leading != forward_pass.shape:
            part = forward_pass.slice_of(x, None if recomputing else place)
            if part is not None:
                return forward_pass.slice_tokens(part, x.device)
        forward_pass.position = None
        if turned is None and place in self.turning and forward_pass.positions_first(leading, rows, turns=True):
            turned = True
        return forward_pass.tokens(leading, x.device, rows, turned)

    def enter(self, place: str, adapter: str, call: Measurement) -> Measurement:
        """Keep what a layer decided in a training pass, for its router losses.

        Args:
            place: Name of the layer.
            adapter: Name of the adapter.
            call: The decision and the losses.

        Returns:
            The same, whose gradients are known when the stack's forward has ended; in a recomputation the call that is
            repeated, whose sums have been joined.
        """
        forward_pass, recomputing = self.asked()
        if not recomputing:
            assert forward_pass is not None
            forward_pass.layers.setdefault((place, adapter), []).append(call)
            forward_pass.losses.layers.setdefault((place, adapter), []).append(call.losses)
            return call
        repeated = forward_pass.layers.get((place, adapter), []) if forward_pass is not None else []
        if torch.compiler.is_compiling() and forward_pass is not None:
            # What leaves a compiled forward leaves its recomputation, so that a checkpoint finds the same saved.
            forward_pass.again[place, adapter] = call
        return repeated_call(repeated, call)

    def record(self, place: str, adapter: str, routing: Routing) -> None:
        """Show what a layer decided to the observers, once per forward pass and never in a recomputation."""
        observers: Sequence[Observer] = self._thread.observers
        if routing.context.training and self.training_observers:
            observers = [*observers, *self.training_observers]
        if not observers or self.asked()[1]:
            return
        for observer in observers:
            observer(place, adapter, routing)

    def need(self, names: frozenset[str]) -> None:
        """Note what a part reads of a token's context beside its sequence; see `Part.context_needs`."""
        self.needs |= names

    def count(self, place: str, adapter: str, sums: Sequence[torch.Tensor]) -> None:
        """Add up what a layer's router decided in a training pass, for `after_step`; never in a recomputation.

        Args:
            place: Name of the layer.
            adapter: Name of the adapter.
            sums: Those of `RoutingStatistics` for the decision.
        """
        if not self.asked()[1]:
            before = self.counted.get((place, adapter))
            self.counted[place, adapter] = (
                list(sums) if before is None else [old + new for old, new in zip(before, sums, strict=True)]
            )

    @property
    def led(self) -> dict[tuple[str, str], Routing]:
        """(block, adapter) -> the decision that the places of a block share; empty when a stack is called."""
        forward_pass, _ = self.asked()
        return self._thread.led if forward_pass is None else forward_pass.led

    def positions_first(self, x: torch.Tensor, rows: Rows, place: str) -> bool:
        """Whether a layer's input has positions first and the rows of the batch second.

        Args:
            x: (..., D) input.
            rows: What its rows are.
            place: Name of the layer.
        """
        forward_pass, leading = self.asked()[0], tuple(x.shape[:-1])
        if forward_pass is None or forward_pass.shape is None or rows == "media":
            return False
        # A single position in front of several rows; masks need not tell it apart.
        single = forward_pass.shape[0] > 1 and leading == (1, forward_pass.shape[0])
        return single or forward_pass.positions_first(leading, rows, turns=place in self.turning)

    def open(
        self, entry: ModuleEntry, args: tuple, kwargs: dict[str, Any], *, hooked: bool
    ) -> tuple[tuple, dict[str, Any]]:
        """Begin a call of the model or of a stack; returns its arguments without the sample groups."""
        if entry.is_model and self.in_charge is not None and not torch.compiler.is_compiling():
            self.in_charge()
        if self.depth() == 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.frozen.freeze(entry.module)
        if entry.is_model and entry.module.training and torch.is_grad_enabled():
            self._warn_accumulation(entry.module)
            if not torch.compiler.is_compiling():
                self._warn_copies(entry.module)
                self._let_inputs_require_gradients(entry.module)
        return super().open(entry, args, kwargs, hooked=hooked)

    def _let_inputs_require_gradients(self, model: nn.Module) -> None:
        """Under ZeRO-3, let the embeddings' output require a gradient.

        DeepSpeed reduces the gradients of a layer once its input has one; a layer whose input needs none would be
        reduced before its parameters have theirs.
        """
        if self._looked_for_parts:
            return
        self._looked_for_parts = True
        enable: Any = getattr(model, "enable_input_require_grads", None)
        tensors = (own for module in model.modules() for own in module._parameters.values() if own is not None)
        if enable is not None and any(hasattr(own, "ds_id") and own.requires_grad for own in tensors):
            enable()

    def finish(self, forward_pass: ForwardPass, output: Any) -> Any:
        """Measure, join and differentiate the router losses of a pass that has ended."""
        if torch.compiler.is_compiling() and all(call.tied for made in forward_pass.layers.values() for call in made):
            return finish_compiled(forward_pass, self.window, output)
        return self._finish(forward_pass, output)

    @torch.compiler.disable
    def _finish(self, forward_pass: ForwardPass, output: Any) -> Any:
        self._warn_window([forward_pass])
        output = finish_pass(forward_pass, self.window, output)
        self._warn_unknown([forward_pass])
        return output

    @torch.compiler.disable
    def finish_together(self, entry: ModuleEntry, passes: Sequence[ForwardPass], output: Any) -> None:
        """See `CallKeeper.finish_together`; nothing is sent where no place has losses to join."""
        self._warn_window(passes)
        shared = self.shared
        places = {} if shared.settled else self.joined_places(entry.module, self)
        device = next((tensor.device for tensor in tensors_in(output)), torch.device("cpu"))
        finish_together(passes, self.window, shared if shared.order or places else None, device)
        self._warn_unknown(passes)
        if entry.is_model and not shared.settled:
            shared.settle(places)
