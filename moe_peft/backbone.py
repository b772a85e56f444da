"""Structural rules that find routers and expert modules in any transformers model, by place and shape."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .types import MoeLayer

ROUTER_NAMES = ("router",)
ROUTER_NAMES_BESIDE_EXPERTS = ("gate", "shared_expert_gate", "router")


def router_names(model: nn.Module) -> set[str]:
    """Names of the modules that decide about a backbone's experts.

    A module called `router` is one wherever it stands; `gate` and `shared_expert_gate` are when `experts` stands
    beside them (the gate of a gated MLP is called `gate_proj`).

    Args:
        model: Any model.

    Returns:
        Full module names; what lies below them belongs to the router too.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        children = dict(module.named_children())
        candidates = ROUTER_NAMES_BESIDE_EXPERTS if "experts" in children else ROUTER_NAMES
        names.update(f"{prefix}.{child}".lstrip(".") for child in children if child in candidates)
    return names


def is_below(name: str, ancestors: set[str]) -> bool:
    """Whether a module name is one of the ancestors or lies below one of them."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in ancestors for end in range(1, len(parts) + 1))


@dataclass(frozen=True)
class ExpertsCall:
    """What an experts module is called with: the routing that the backbone really uses.

    Attributes:
        hidden: (T, H) input.
        index: (T, K) integer expert of each slot.
        weights: (T, K) its combine weight.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


def experts_call(args: tuple, kwargs: dict[str, Any]) -> ExpertsCall:
    """Tell the inputs of an experts module apart by their types.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: They are not hidden states, integer indices and floating weights.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    integer = [tensor for tensor in tensors if not tensor.is_floating_point()]
    if len(floating) != 2 or len(integer) != 1 or floating[1].shape != integer[0].shape:
        found = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        raise ValueError(f"An experts module was called with {found}, not with (T, H) hidden states, (T, K) indices.")
    return ExpertsCall(floating[0], integer[0], floating[1])


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The sparse layers of a model, in its order; empty for a dense one."""
    found: list[MoeLayer] = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if leaf == "base_layer" or leaf.startswith("shared") or not hasattr(base, "down_proj"):
            continue
        if not (hasattr(base, "has_gate") and hasattr(base, "num_experts")):
            continue
        parent_name = name.rpartition(".")[0]
        parent = model.get_submodule(parent_name)
        children = dict(parent.named_children())
        inline = any("attn" in child or "attention" in child for child in children)
        router = next((child for child in ("gate", "router") if child in children), None)
        shared = tuple(f"{parent_name}.{c}" for c in children if c.startswith("shared") and not c.endswith("gate"))
        transposed = bool(base.is_transposed)
        first: Any = getattr(base, "gate_up_proj", None)
        first = base.up_proj if first is None else first
        last: Any = base.down_proj
        found.append(
            MoeLayer(
                index=int(re.findall(r"\.(\d+)\.", name)[-1]),
                experts=name,
                block=None if inline else parent_name.removesuffix(".base_layer"),
                router=f"{parent_name}.{router}" if router else None,
                shared_experts=shared,
                num_experts=first.shape[0],
                in_features=first.shape[1] if transposed else first.shape[2],
                out_features=last.shape[2] if transposed else last.shape[1],
            )
        )
    return found


def unsupported_reason(model: nn.Module) -> str | None:
    """Why a model with experts cannot be handled; None where it can, or is dense."""
    return None
