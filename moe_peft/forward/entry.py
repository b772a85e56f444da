"""The way into a module whose call is a forward pass, whether it is called or its `forward` is.

Hooks see calls, `model(...)`; callers that take `model.forward(...)` pass them by, and an interrupt ends a call
without them. So the module's `forward` is wrapped as well: it opens what no hook has opened, and closes what an
interrupt leaves open.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any, Protocol

import torch
from torch import nn


class Doorkeeper(Protocol):
    """Who is told of the calls of a module."""

    def open(self, entry: ModuleEntry, args: tuple, kwargs: dict[str, Any], *, hooked: bool) -> tuple[tuple, dict]:
        """Begin a call; returns the arguments that the module is to get."""
        ...

    def close(self, entry: ModuleEntry, output: Any) -> Any:
        """End the innermost call, which is one of this module; returns what it is to return."""
        ...

    def depth(self) -> int:
        """Number of calls that are open."""
        ...

    def reach(self, entry: ModuleEntry) -> bool:
        """Say that the module's forward is reached; returns whether hooks have opened the call."""
        ...

    def drop(self, depth: int) -> None:
        """Forget the calls beyond a depth, which an error or an interrupt has ended."""
        ...


class ModuleEntry:
    """Stands for the `forward` of a module, and hooks it.

    Args:
        keeper: Who is told of the calls.
        module: The module.
        is_model: Whether it is the whole model.
        is_stack: Whether its call is one pass over a batch.
    """

    def __init__(self, keeper: Doorkeeper, module: nn.Module, *, is_model: bool, is_stack: bool) -> None:
        self.keeper: Doorkeeper | None = keeper
        self.module = module
        self.is_model = is_model
        self.is_stack = is_stack
        self.inner: Callable[..., Any] | None = module.__dict__.get("forward")
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True, prepend=is_model),
            module.register_forward_hook(self.after, always_call=True),
        ]
        module.forward = self

    def remove(self) -> None:
        """Leave the module as it was; whoever has wrapped its forward since calls through."""
        for handle in self.handles:
            handle.remove()
        self.keeper = None
        if self.module.__dict__.get("forward") is self:
            del self.module.forward
            if self.inner is not None:
                self.module.forward = self.inner

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward it stands for, which trainers and `generate` read."""
        return inspect.signature(self._own_forward)

    @property
    def __name__(self) -> str:
        """Name of the method it stands for."""
        return "forward"

    @property
    def __code__(self) -> CodeType:
        """That of the forward it stands for, by which `torch.export` names inputs and their sizes."""
        code: CodeType = self._own_forward.__code__
        return code

    @property
    def _own_forward(self) -> Callable[..., Any]:
        return self.inner or type(self.module).forward.__get__(self.module)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Open the call; the hook before the forward."""
        if self.keeper is None:
            return None
        return self.keeper.open(self, args, kwargs, hooked=True)

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Close the call, also after an error; the hook after the forward."""
        return None if self.keeper is None else self.keeper.close(self, output)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward inside a call."""
        if args and args[0] is self.module:  # bound to its module once more
            args = args[1:]
        if self.keeper is None:
            return self._run(args, kwargs)
        if self.keeper.reach(self):
            return self._run_hooked(self.keeper, args, kwargs)
        depth = self.keeper.depth()
        try:
            args, kwargs = self.keeper.open(self, args, kwargs, hooked=False)
            output = self._run(args, kwargs)
            return self.keeper.close(self, output)
        finally:
            self.keeper.drop(depth)

    def _run_hooked(self, keeper: Doorkeeper, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return self._run(args, kwargs)
        depth = keeper.depth() - 1
        try:
            return self._run(args, kwargs)
        except Exception:  # the hook after the forward runs
            raise
        except BaseException:  # it does not
            keeper.drop(depth)
            raise

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        # Not through a property, which compiled code would not see through.
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)
