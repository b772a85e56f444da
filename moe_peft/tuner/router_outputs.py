"""Keeps `output_router_logits` of transformers working where routers are wrapped."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks


def record_router_outputs(model: nn.Module) -> None:
    """Install the hooks of `output_router_logits` where they look a router up by a path that wrapping changes.

    Elsewhere transformers installs them when they are asked for; without them a model compiles to one graph. A second
    set of hooks, of a model around one that has them, would record every router twice.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not _records(module):
            recorders = (module._can_record_outputs or {}).get("router_logits", [])
            recorders = recorders if isinstance(recorders, list) else [recorders]
            if any(getattr(recorder, "layer_name", None) for recorder in recorders):
                maybe_install_capturing_hooks(module)


def _records(model: nn.Module) -> bool:
    """Whether the hooks are installed in a model, or in one that is part of it."""
    return any(getattr(part, "_output_capturing_hooks_installed", False) for part in model.modules())
