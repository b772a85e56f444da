"""Weights that accelerate keeps on the CPU or on disk: meta tensors that its hooks fill around a module's call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import align_module_device
from torch import nn


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which a module computes, whose weights are kept elsewhere; None where no hook tells.

    Args:
        module: Any module; where it has no weights of its own, the first below it that tells is asked.
    """
    devices = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    device = next((device for device in devices if device is not None), None)
    return None if device is None else torch.device(device)


def onloaded(module: nn.Module) -> AbstractContextManager[None]:
    """Have the values of a module's own weights in the block; changes are lost.

    Nothing is loaded where tensors are only planned, inside `torch.device("meta")`.

    Args:
        module: The module; weights of modules below it are left alone.
    """
    return nullcontext() if torch.get_default_device().type == "meta" else align_module_device(module)


def _hooks(module: nn.Module) -> Iterator[object]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
