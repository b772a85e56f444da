"""Runs another computation in the place of an experts module's forward, for the duration of one call.

Where anything beside its forward happens in a call, the module itself is called, so that its hooks fire and offloaded
or sharded weights arrive; nothing of it changes between calls. Threads that call the module at the same time see their
own computation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..backbone.local_experts import local_experts

_lock = threading.Lock()


class _Replacement:
    """Stands at a module's forward while calls with another computation are under way.

    Attributes:
        own: The module's own forward.
        instance: Whether that is an attribute of the module itself, not of its class.
        by_thread: Thread -> (owner, computation) of its calls, the innermost last.
    """

    def __init__(self, module: nn.Module, slot: str) -> None:
        self.own: Callable = getattr(module, slot)
        self.instance = slot in module.__dict__
        self.by_thread: dict[int, list[tuple[object, Callable]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = self.by_thread.get(threading.get_ident())
        return (calls[-1][1] if calls else self.own)(*args, **kwargs)


@contextmanager
def replaced_forward(experts: nn.Module, owner: object, compute: Callable) -> Iterator[None]:
    """Let calls of a module by this thread run another computation.

    Args:
        experts: The module.
        owner: Who asks for it, see `owner_of_pass`.
        compute: Called with the module's arguments.
    """
    slot = _slot(experts)
    thread = threading.get_ident()
    with _lock:
        replacement = experts.__dict__.get(slot)
        if not isinstance(replacement, _Replacement):
            replacement = _Replacement(experts, slot)
            experts.__dict__[slot] = replacement
        replacement.by_thread.setdefault(thread, []).append((owner, compute))
    try:
        yield
    finally:
        with _lock:
            replacement.by_thread[thread].pop()
            if not replacement.by_thread[thread]:
                del replacement.by_thread[thread]
            if not replacement.by_thread:
                if replacement.instance:
                    experts.__dict__[slot] = replacement.own
                else:
                    del experts.__dict__[slot]


def owner_of_pass(experts: nn.Module) -> object | None:
    """Who has set the computation that a call of a module by this thread would run; None for the module itself.

    Args:
        experts: The module.
    """
    replacement = experts.__dict__.get(_slot(experts))
    if not isinstance(replacement, _Replacement):
        return None
    calls = replacement.by_thread.get(threading.get_ident())
    return calls[-1][0] if calls else None


def call_with(
    compute: Callable, owner: object, outermost: nn.Module, experts: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Call a module whose experts run another computation in that call.

    Args:
        compute: Called with the experts' arguments; of experts that processes share, with the rows and local ids that
            this process is sent.
        owner: Who asks for it.
        outermost: What is called: the experts module, or layers around it.
        experts: The backbone's experts module.
        *args: Arguments of the call.
        **kwargs: The same by name.
    """
    local = local_experts(experts)
    if local is not None:
        with local.changed(lambda own, *call: compute(*call), replaces=True):
            return outermost(*args, **kwargs)
    if outermost is experts and not is_watched(experts):
        return compute(*args, **kwargs)
    if torch.compiler.is_compiling():
        return _call_outside_of_the_graph(compute, owner, outermost, experts, *args, **kwargs)
    with replaced_forward(experts, owner, compute):
        return outermost(*args, **kwargs)


@torch.compiler.disable
def _call_outside_of_the_graph(*args: Any, **kwargs: Any) -> Any:
    return call_with(*args, **kwargs)


def is_watched(module: nn.Module) -> bool:
    """Whether something happens when a module is called beside its forward: hooks, or weights that arrive.

    Args:
        module: Any module.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = module.__dict__
    replaced = "_old_forward" in own or own.get("_compiled_call_impl") is not None
    return replaced or any(hooks) or all_modules_are_hooked()


def all_modules_are_hooked() -> bool:
    """Whether hooks run when any module at all is called."""
    own = nn.modules.module
    return bool(
        own._global_forward_hooks
        or own._global_forward_pre_hooks
        or own._global_backward_hooks
        or own._global_backward_pre_hooks
    )


def _slot(module: nn.Module) -> str:
    # accelerate's hooks keep the forward that they call under this name.
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"
