"""Structural rules that find routers and expert modules in any transformers model, by place and shape."""

from __future__ import annotations

from torch import nn

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
