"""What a model's forwards warn of, each once: layers outside of a forward, gradients that nobody weighs or joins."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from ..messages import shown, warn
from .calls import CallKeeper
from .forward_pass import ForwardPass
from .joined_losses import WindowSums
from .replicas import warning_of

OUTSIDE = (
    "A routed layer in train mode ran outside a forward of its model: router losses, dropout and capacity are off "
    "there. Call the model itself, as in model(**batch), not a part of it."
)
ACCUMULATION = (
    "The gradients of several forwards add up before an optimizer step, and each adds its router losses with weight "
    "one. In a trainer, call moe_peft.attach(trainer). In a loop over n micro-batches, call "
    "((loss + moe_peft.router_loss(model)) / n).backward()."
)
NO_WINDOW = (
    "load_balancing_scope='accumulation_window' needs to know where a window begins, which moe_peft.attach(trainer) "
    "tells. Without it the balance is measured as with 'global_batch'."
)


UNKNOWN = (
    "{} reads some tokens of the batch alone, as an expert of the backbone does, and which ones is not known: its "
    "router losses count padding as well. Give batches without padding, or leave it out of target_modules."
)

# Of what was seen last, nothing is kept in copies.
LAST_SEEN = ("_last_parameter", "_watched")


class WarningKeeper(CallKeeper):
    """Warns once of each thing that a training loop does not tell or tells wrongly.

    Attributes:
        window: Sums of the accumulation window so far, set by the trainer's callback; None in a plain loop.
        managed: Whether a trainer's callback keeps `loss_scale` and `window`.
        late: Names of adapters that came after the model had been split, until somebody looks at their training; the
            keys of a dict, whose order is the same on all processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window: WindowSums | None = None
        self.managed = False
        self.late: dict[str, None] = {}
        self._warned: set[str] = set()

    def _forget(self) -> None:
        super()._forget()
        self._last_parameter: tuple[int, int] | None = None
        self._watched: weakref.ref[nn.Parameter] | None = None

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    def _warn_accumulation(self, model: nn.Module) -> None:
        """Warn where a plain loop adds up gradients of several forwards without weighing the router losses."""
        latest = self._thread.latest
        if self.managed or ACCUMULATION in self._warned or (latest is not None and not latest.scale.attached):
            return
        parameter = None if self._watched is None else self._watched()
        if parameter is None or not parameter.requires_grad:
            parameter = next((p for n, p in model.named_parameters() if p.requires_grad and "_router." in n), None)
            if parameter is None:
                return
            self._watched = weakref.ref(parameter)
        seen = (id(parameter), parameter._version)
        unweighed = latest is not None and latest.scale.reached > 0 and not latest.scale.replaced
        if unweighed and self.loss_scale == 1.0 and parameter.grad is not None and seen == self._last_parameter:
            self._warn_once(ACCUMULATION)
        self._last_parameter = seen

    def _warn_copies(self, model: nn.Module) -> None:
        """Warn where a plain loop trains copies of an adapter that no process shares with the others."""
        while self.late and not self.managed:
            name = next(iter(self.late))
            del self.late[name]
            message = warning_of(model, name)
            if message is not None:
                self._warn_once(message)

    def _warn_unknown(self, passes: Sequence[ForwardPass]) -> None:
        for forward_pass in passes:
            if forward_pass.unknown and "unknown" not in self._warned:
                self._warned.add("unknown")
                warn(UNKNOWN.format(shown(forward_pass.unknown)))

    def _warn_window(self, passes: Sequence[ForwardPass]) -> None:
        scopes = [call.losses.scope for one in passes for made in one.layers.values() for call in made]
        if self.window is None and "accumulation_window" in scopes:
            self._warn_once(NO_WINDOW)
