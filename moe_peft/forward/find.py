"""Where trackers hang in a tree of modules, and which modules are stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..messages import shown

if TYPE_CHECKING:
    from .tracker import ForwardTracker

TRACKER_ATTRIBUTE = "_moe_peft_tracker"
ENTRIES_ATTRIBUTE = "_moe_peft_entries"


def find_trackers(model: nn.Module) -> list[ForwardTracker]:
    """The trackers of all models with routed adapters in a tree of modules, the outermost first.

    Args:
        model: Any module: an adapted model, what wraps it, or what holds several.

    Raises:
        TypeError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"A model must be a torch.nn.Module, not {shown(model)} ({type(model).__name__}).")
    found: list[ForwardTracker] = []
    for module in model.modules():
        tracker = module.__dict__.get(TRACKER_ATTRIBUTE)
        if tracker is not None and not any(tracker is other for other in found):
            found.append(tracker)
    return found


def find_tracker(model: nn.Module) -> ForwardTracker | None:
    """The tracker of a model with routed adapters, wherever in the tree it hangs; None when there is none."""
    return next(iter(find_trackers(model)), None)


def find_stacks(model: nn.Module) -> list[nn.Module]:
    """The modules whose call is one pass over a batch: encoder and decoder, the backbone, or the model itself."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_encoder_decoder and hasattr(model, "get_encoder") and hasattr(model, "get_decoder"):
        stacks = [cast(Any, model).get_encoder(), cast(Any, model).get_decoder()]
        if all(isinstance(stack, nn.Module) and stack is not model for stack in stacks):
            return stacks
    backbone = getattr(model, "base_model", model)
    return [backbone if isinstance(backbone, nn.Module) else model]
