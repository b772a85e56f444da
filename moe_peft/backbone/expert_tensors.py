"""A backbone's fused experts as tensors, and the backbone's own computation on other tensors of the same layout."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .partitioned import is_partitioned, shape_of

# State of a module that must not leak into a stand-in for it.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def keeps_slices(experts: nn.Module, num_experts: int) -> bool:
    """Whether a module keeps one slice of 16 or 32 bit per expert, or packed ones that unpack to such.

    Args:
        experts: An experts module; nothing is unpacked.
        num_experts: E.
    """
    packed = len(experts.parametrizations) if parametrize.is_parametrized(experts) else 0  # type: ignore[arg-type]
    own = [t for t in experts.parameters(recurse=False) if _has_slices(t, num_experts)]
    return packed + len(own) >= 2 and all(t.is_floating_point() and t.element_size() > 1 for t in own)


def expert_tensors(experts: nn.Module, num_experts: int) -> dict[str, torch.Tensor]:
    """The tensors with one slice per expert; quantized ones dequantized.

    Args:
        experts: A fused experts module.
        num_experts: E; slices beyond it, as of identity experts, are left out.

    Returns:
        Name -> (E, ...) tensor, a view of the module's own, on the meta device where its values are not here; empty
        where the module keeps its experts in another form.
    """
    names = [name for name, _ in experts.named_parameters(recurse=False)]
    if parametrize.is_parametrized(experts):
        names += list(experts.parametrizations)  # type: ignore[arg-type]
    tensors: dict[str, torch.Tensor] = {name: getattr(experts, name) for name in names}
    return {name: _whole(t)[:num_experts] for name, t in tensors.items() if _has_slices(t, num_experts)}


def _has_slices(tensor: torch.Tensor, num_experts: int) -> bool:
    shape = shape_of(tensor)
    return len(shape) > 1 and shape[0] >= num_experts


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if is_partitioned(tensor):
        return torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta")
    return tensor


def run_experts(
    experts: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    num_experts: int,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    """Compute fused experts with other tensors in the place of the module's own.

    Layout, activation, clamps and the implementation (eager, grouped_mm, ...) are those of the module: a stand-in of
    its class shares everything but the tensors and the number of experts.

    Args:
        experts: The backbone's experts module.
        tensors: Name -> (n, ...) tensors that replace (E, ...) ones.
        num_experts: E, the number of experts of the module.
        hidden_TD: (T, D) input.
        index_TK: (T, K) int64, from 0 to n - 1.
        weights_TK: (T, K) combine weights.

    Returns:
        (T, O) weighted sum.
    """
    count = next(iter(tensors.values())).shape[0]
    stand_in: Any = object.__new__(own_class(experts, tensors))
    stand_in.__dict__ = {
        name: count if "experts" in name and value == num_experts and type(value) is int else value
        for name, value in experts.__dict__.items()
        if name != "forward"
    }
    stand_in.__dict__.update({name: OrderedDict() for name in HOOKS})
    stand_in.__dict__["_parameters"] = {name: tensor.to(hidden_TD.dtype) for name, tensor in tensors.items()}
    modules = {name: module for name, module in experts._modules.items() if name != "parametrizations"}
    stand_in.__dict__["_modules"] = modules
    if index_TK.shape[1] == 1 and not hasattr(experts, "has_gate"):
        # Loops outside transformers' common interface may not run with a single slot; a second one adds nothing.
        index_TK, weights_TK = index_TK.expand(-1, 2), torch.cat([weights_TK, torch.zeros_like(weights_TK)], dim=1)
    return stand_in.forward(hidden_TD, index_TK, weights_TK)


def own_class(experts: nn.Module, names: Iterable[str]) -> type[nn.Module]:
    """The backbone's class of an experts module.

    Parametrization and sharding put classes of their own on top, whose tensors are computed or gathered in a call.

    Args:
        experts: The module.
        names: Names of its tensors.
    """
    owns = [cls for cls in type(experts).__mro__ if not any(hasattr(cls, name) for name in names)]
    return next(cls for cls in owns if hasattr(cls, "forward"))
