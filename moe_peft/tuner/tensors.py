"""Which tensors an adapter has: those that are to be built, those that a model holds, and how files name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..backbone.partitioned import shape_of
from ..backbone.split_rows import SplitRows
from ..config.config import MoeConfig
from ..config.fitting_parts import check_fit
from ..layers import RoutedLayer
from ..place import Place
from .part_tensors import check_declared, check_saved

PEFT_PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"
# Modules that activation checkpointing, compilation and sharding put around a module, and into its name.
AROUND = re.compile(r"(?:^|(?<=\.))(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")

Shapes = dict[str, tuple[int, ...]]


def plain_name(name: str) -> str:
    """The name of a module or weight without the wrappers of checkpointing, compilation and sharding.

    Args:
        name: Its full name.
    """
    return AROUND.sub("", f"{name}.")[:-1]


def planned_tensors(config: MoeConfig, prefix: str, places: Sequence[Place]) -> Shapes:
    """Tensors that an adapter will have, found without memory for them.

    Args:
        config: Its configuration, resolved for the model.
        prefix: What the attributes of its type begin with.
        places: Where it is put.

    Returns:
        Key in a file, without peft's own prefix -> shape.

    Raises:
        ValueError: A part has tensors that a file would lose, or others than its class says, or the parts of a
            place do not go together.
    """
    shapes: Shapes = {}
    for place in places:
        own = config.at(place)
        with torch.device("meta"):
            parts = own.build(place)
        check_fit(own, parts)
        check_saved(own, place, parts)
        for attribute, module in (("experts", parts.experts), ("router", parts.router)):
            for name, tensor in (module.state_dict() if module is not None else {}).items():
                shapes[f"{plain_name(place.name)}.{prefix}{attribute}.{name}"] = tuple(tensor.shape)
    check_declared(config, shapes)
    return shapes


def present_tensors(model: nn.Module, prefix: str, adapter_name: str) -> Shapes:
    """Tensors of an adapter that a model has.

    Args:
        model: The model, in a `PeftModel` or not.
        prefix: What the attributes of the adapter's type begin with.
        adapter_name: Its name.

    Returns:
        Key in a file, without peft's own prefix -> shape, of a sharded tensor as a whole.
    """
    return {own.key: own.shape for own in named_tensors(model, prefix, adapter_name).values()}


@dataclass(frozen=True)
class OwnTensor:
    """A tensor of an adapter.

    Attributes:
        key: Its key in a file, without peft's own prefix.
        shape: Its shape in a file, of a sharded tensor as a whole.
        split: How its rows are split over processes, where that is not in the file's order.
    """

    key: str
    shape: tuple[int, ...]
    split: SplitRows | None = None


def named_tensors(model: nn.Module, prefix: str, adapter_name: str) -> dict[str, OwnTensor]:
    """Tensors of an adapter by the names that a model has for them, without wrappers.

    Args:
        model: The model, in a `PeftModel` or not.
        prefix: What the attributes of the adapter's type begin with.
        adapter_name: Its name.
    """
    found: dict[str, OwnTensor] = {}
    for name, layer in routed_modules(model, prefix):
        rows = layer.split_of(adapter_name)
        for attribute, bank, split in (("experts", layer.experts, rows), ("router", layer.router, None)):
            if adapter_name in bank:
                for own, tensor in bank[adapter_name].state_dict(keep_vars=True).items():
                    head, last = f"{name}.{prefix}{attribute}", plain_name(own)
                    key = f"{head.removeprefix(PEFT_PREFIX)}.{last}"
                    shape = shape_of(tensor) if split is None else split.shape(tensor)
                    found[f"{head}.{adapter_name}.{last}"] = OwnTensor(key, shape, split)
    return found


def routed_modules(model: nn.Module, prefix: str) -> Iterator[tuple[str, RoutedLayer]]:
    """Layers of one adapter type, by their names without wrappers.

    Args:
        model: The model.
        prefix: What the attributes of the type begin with.
    """
    for name, module in model.named_modules():
        if isinstance(module, RoutedLayer) and module.prefix == prefix:
            yield plain_name(name), module


def further_tensors(model: nn.Module, config: MoeConfig) -> Shapes:
    """Tensors of the modules that an adapter trains in full and saves with it (`modules_to_save`).

    Args:
        model: The base model, with or without the adapter.
        config: The adapter's configuration.

    Returns:
        Key in a file, without peft's own prefix -> shape.
    """
    shapes: Shapes = {}
    skipped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(skipped or "\0"):
            continue
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
            skipped += tuple(f"{name}.{child}" for child, _ in module.named_children() if child != "base_layer")
        if any(name.endswith(ending) for ending in config.modules_to_save or ()):
            whole = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            key = base_key(plain_name(name).removeprefix(PEFT_PREFIX))
            state = whole.state_dict(keep_vars=True)
            shapes |= {f"{key}.{plain_name(own)}": shape_of(tensor) for own, tensor in state.items()}
            skipped += (f"{name}.",)
    return shapes


def base_key(key: str) -> str:
    """The name that a weight of the base model has without adapters around it.

    Args:
        key: Its name.
    """
    return key.replace(".base_layer.", ".")
