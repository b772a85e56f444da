"""Which modules of a model are called in a forward pass, found by running one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def called_modules(model: nn.Module, names: Iterable[str], inputs: Mapping[str, Any]) -> set[str]:
    """Run a model once, in evaluation and without gradients, and note which modules are called.

    Args:
        model: Any model; its mode and its hooks are afterwards as they were.
        names: Full names of the modules to look at.
        inputs: Keyword arguments of the model.

    Returns:
        Those of the names whose modules were called at least once.
    """
    called: set[str] = set()
    modes = {module: module.training for module in model.modules()}
    handles = []
    try:
        for name in names:

            def note(module: nn.Module, args: tuple, name: str = name) -> None:
                called.add(name)

            handles.append(model.get_submodule(name).register_forward_pre_hook(note))
        model.eval()
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return called
