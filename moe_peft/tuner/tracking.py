"""Which tracker serves the places of an adapter, when none is needed any more, and what must wait for its threads."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..forward.find import TRACKER_ATTRIBUTE, find_trackers
from ..forward.tracker import ForwardTracker
from ..layers import RoutedLayer


def tracker_around(model: nn.Module, places: Iterable[str]) -> ForwardTracker | None:
    """The tracker of the innermost module that holds all places of an adapter; None where there is none.

    Args:
        model: The model that is given the adapter.
        places: Full names in it of the modules that are wrapped.
    """
    names = list(places)
    found = None
    for name, module in model.named_modules():
        tracker = module.__dict__.get(TRACKER_ATTRIBUTE)
        if tracker is not None and all(not name or place.startswith(f"{name}.") for place in names):
            found = tracker
    return found


def detach_unused(model: nn.Module) -> None:
    """Take the trackers off the models that hold no routed layer any more."""
    for module in list(model.modules()):
        tracker = module.__dict__.get(TRACKER_ATTRIBUTE)
        if tracker is not None and not any(isinstance(part, RoutedLayer) for part in module.modules()):
            tracker.detach(module)


def refuse_in_use(model: nn.Module, operation: str) -> None:
    """Refuse to change the adapters of a model under another thread's forward.

    Args:
        model: The model.
        operation: What is to be done, for the message.

    Raises:
        RuntimeError: Another thread is inside a forward of the model.
    """
    for tracker in find_trackers(model):
        tracker.refuse_in_use(operation)
