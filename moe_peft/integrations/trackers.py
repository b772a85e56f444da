"""Finds the trackers of a trainer's model, wherever in its tree adapters are."""

from __future__ import annotations

from torch import nn

from ..forward.tracker import TRACKER_ATTRIBUTE, ForwardTracker


def find_trackers(model: nn.Module) -> list[ForwardTracker]:
    """The trackers of all adapted models that a model is made of, in the order of its modules.

    Args:
        model: Any model: an adapted one, a wrapper of it, or a pipeline of several.
    """
    found = [module.__dict__[TRACKER_ATTRIBUTE] for module in model.modules() if TRACKER_ATTRIBUTE in module.__dict__]
    return list(dict.fromkeys(found))
