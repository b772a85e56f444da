"""Another adapter for each row of a batch: names checked before anything runs, and given to this thread's calls alone.

The layers read them from the forward context of their thread. Modules of peft's own (modules_to_save and the like)
take them as an argument, from a hook that stands while any thread needs it and reads the names of its thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..forward.find import find_trackers
from ..forward.thread_state import RowNames
from ..forward.tracker import ForwardTracker
from ..layers import RoutedLayer
from ..messages import shown

BASE = "__base__"
# Arguments whose rows are those of the batch, of forwards and of `generate`.
BATCH_INPUTS = ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")

_lock = threading.Lock()


def known_adapters(model: nn.Module) -> set[str]:
    """Names of the routed adapters of a model."""
    return {name for layer in model.modules() if isinstance(layer, RoutedLayer) for name in layer.experts}


def check_row_names(
    adapter_names: Sequence[str], known: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> RowNames:
    """Refuse names that no adapter has, or that are not as many as the rows of the batch.

    Args:
        adapter_names: Adapter of each row, "__base__" for none.
        known: Names of the adapters there are.
        args: Positional arguments of the call.
        kwargs: Arguments of the call by name.

    Returns:
        The names. Where the rows were counted, more rows inside the call are repetitions by beams or
        `num_return_sequences`.

    Raises:
        TypeError: The names are no list of strings.
        ValueError: A name is unknown, or their number is not that of the rows.
    """
    is_list = isinstance(adapter_names, (list, tuple)) and all(isinstance(name, str) for name in adapter_names)
    if not is_list:
        raise TypeError(
            f"`adapter_names` must be a list of one adapter name per row of the batch, not {shown(adapter_names)}."
        )
    unknown = sorted(set(adapter_names) - set(known) - {BASE})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)[:200]}. "
            f"Known adapters: {', '.join(sorted(known))[:200]}."
        )
    num_rows = _num_rows(args, kwargs)
    if num_rows is not None and num_rows != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {num_rows} respectively. Give one name per row of the batch, also with "
            "num_beams or num_return_sequences, which repeat the rows and their names."
        )
    return RowNames(tuple(adapter_names), may_repeat=num_rows is not None)


@contextmanager
def give_row_names(model: nn.Module, names: RowNames) -> Iterator[None]:
    """Have every call of this thread inside the context use the adapters of its rows."""
    trackers = find_trackers(model)
    before = [tracker.give_row_names(names) for tracker in trackers]
    try:
        with ExitStack() as hooks:
            for module in model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper) and trackers:
                    hooks.enter_context(_hand_names(module, trackers[0]))
            yield
    finally:
        for tracker, names_before in zip(trackers, before, strict=True):
            tracker.give_row_names(names_before)


def _num_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of the batch, where the call brings it."""
    for value in (*args[:1], *(kwargs.get(name) for name in BATCH_INPUTS)):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


class _NamesHook:
    """Hands its thread's names to a module of peft's; counts the calls that need it."""

    def __init__(self, module: nn.Module, tracker: ForwardTracker) -> None:
        self.tracker = tracker
        self.users = 0
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        names = None if x is None else self.tracker.row_names(x)
        return args, kwargs if names is None else {**kwargs, "adapter_names": names}


_hooks: dict[int, _NamesHook] = {}


@contextmanager
def _hand_names(module: nn.Module, tracker: ForwardTracker) -> Iterator[None]:
    key = id(module)
    with _lock:
        if key not in _hooks:
            _hooks[key] = _NamesHook(module, tracker)
        hook = _hooks[key]
        hook.users += 1
    try:
        yield
    finally:
        with _lock:
            hook.users -= 1
            if hook.users == 0:
                hook.handle.remove()
                del _hooks[key]
