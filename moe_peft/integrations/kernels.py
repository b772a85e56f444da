"""Kernels that replace forwards of a finished model, as `use_liger_kernel=True` does, seen from its adapters.

Liger gives modules another `forward`, and the model one that computes the loss from the hidden states and the weight
of the output layer. What runs in the place of an adapter is then not the adapter, and one of the output layer
is never called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from ..forward.entry import ModuleEntry
from ..layers import RoutedLayer
from ..messages import shown

FUSED_LOSS = "liger_kernel"
WAY_OUT = "use_liger_kernel=True with liger_kernel_config={{{!r}: False}}"


def check_kernels(model: nn.Module) -> None:
    """Refuse kernels that an adapter would take no part in.

    Args:
        model: A model with routed adapters, after the trainer has applied its kernels.

    Raises:
        ValueError: The forward of a layer is another class's, or the loss is computed from the weight of an output
            layer that an adapter wraps.
    """
    for layer in (module for module in model.modules() if isinstance(module, RoutedLayer)):
        other = _bound(layer)
        if other is not None and getattr(other, "__func__", None) is not type(layer).forward:
            raise ValueError(
                f"The forward of the layer {shown(layer.place)}, which an adapter wraps, has been replaced by "
                f"{shown(getattr(other, '__qualname__', other))}, so that its adapter would take no part. Write "
                f"{WAY_OUT.format('swiglu')} (or 'geglu'), or apply such kernels before the adapter is added."
            )
    for module in model.modules():
        head = cast(Any, module).get_output_embeddings() if _computes_loss_itself(module) else None
        if isinstance(head, RoutedLayer):
            raise ValueError(
                f"{type(module).__name__} computes its loss from the weight of {shown(head.place)}, so that the "
                f"adapter there would take no part in training. Write {WAY_OUT.format('fused_linear_cross_entropy')}, "
                "or leave the output layer out of target_modules."
            )


def _computes_loss_itself(module: nn.Module) -> bool:
    """Whether a model's forward is one of Liger's, of its own or of its class, before or after adapters came."""
    if not hasattr(module, "get_output_embeddings"):
        return False
    forward = _bound(module) or type(module).forward
    return str(getattr(forward, "__module__", "")).partition(".")[0] == FUSED_LOSS


def _bound(module: nn.Module) -> Callable[..., Any] | None:
    """The method that a module has been given beside those of its class; wrappers that call through are none."""
    own = module.__dict__.get("forward")
    own = own.inner if isinstance(own, ModuleEntry) else own
    return own if getattr(own, "__self__", None) is module else None
