"""Everything of a model that an operation must leave alone when it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Snapshot(NamedTuple):
    """What is compared.

    Attributes:
        facts: Modules with their types, modes, hooks and adapters, and parameters with their flags, by name.
        tensors: Parameters and buffers by name, copied.
        identities: Their addresses; an optimizer that holds a tensor must still hold the model's.
    """

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    identities: dict[str, int]


def take(model: nn.Module) -> Snapshot:
    """Record the state of a model."""
    facts = dict(_facts(model))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return Snapshot(facts, {name: t.detach().clone() for name, t in named}, {name: id(t) for name, t in named})


def difference(before: Snapshot, after: Snapshot) -> str | None:
    """The first thing that differs between two states, or None."""
    for name in [*before.facts, *(name for name in after.facts if name not in before.facts)]:
        old, new = before.facts.get(name, "absent"), after.facts.get(name, "absent")
        if old != new:
            return f"{name} was {_short(old)} and is {_short(new)}"
    for name, tensor in before.tensors.items():
        if not torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(after.tensors[name])):
            return f"{name} has other values"
        if before.identities[name] != after.identities[name]:
            return f"{name} is another tensor"
    return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _facts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules(remove_duplicate=False):
        yield f"module {name}", f"{type(module).__module__}.{type(module).__name__}"
        yield f"mode of {name}", module.training
        for kind in HOOKS:
            yield f"{kind} of {name}", [getattr(hook, "__qualname__", str(hook)) for hook in _hooks(module, kind)]
        for adapters in ("_active_adapter", "merged_adapters", "_disable_adapters"):
            if adapters in module.__dict__:
                yield f"{adapters} of {name}", str(module.__dict__[adapters])
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict):
            yield f"adapters of {name}", {key: _fields(config) for key, config in configs.items()}
        yield f"peft flag of {name}", module.__dict__.get("_hf_peft_config_loaded", False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield f"parameter {name}", (parameter.dtype, parameter.requires_grad, tuple(parameter.shape))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield f"buffer {name}", (buffer.dtype, tuple(buffer.shape))


def _hooks(module: nn.Module, kind: str) -> list[Any]:
    return list((getattr(module, kind, None) or {}).values())


def _fields(config: Any) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, set) else str(v) for k, v in config.to_dict().items()}
