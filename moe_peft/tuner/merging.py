"""Merging adapters into the weights of a model: everything is checked first, then all layers merge, or none does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn

from ..backbone.partitioned import check_mergeable_here
from ..layers import RoutedLayer
from ..messages import shown
from .transaction import restorer

WAY_OUT = (
    "Keep it as an adapter (model.save_pretrained), or call unload() to get the base model back. Adapters of linear "
    "layers merge exactly with num_experts=1."
)


@dataclass(frozen=True)
class Merge:
    """A layer, and which of its adapters are to be merged there.

    Attributes:
        layer: A tuner layer of any type.
        names: Adapters that it holds and has not merged, each once.
    """

    layer: BaseTunerLayer
    names: list[str]


def plan_merges(
    model: nn.Module, adapter_names: Sequence[str] | None, prefix: str | None, known: Sequence[str]
) -> list[Merge]:
    """List what a merge has to do, an inner layer before the one around it, without changing anything.

    Args:
        model: The model with adapters.
        adapter_names: Adapters to merge; None takes the active ones of each layer.
        prefix: The adapter type that is merged, with the tokens trained beside it; None merges all types, as the
            layers of all types are about to be taken off.
        known: Names that are accepted, also where no layer holds them.

    Returns:
        The layers where there is something to merge.

    Raises:
        TypeError: `adapter_names` is no list of names.
        ValueError: One of them is no adapter of the model.
    """
    if adapter_names is not None:
        _check_names(model, adapter_names, known)
    plan: list[Merge] = []
    for layer in reversed([module for module in model.modules() if isinstance(module, BaseTunerLayer)]):
        own = prefix is None or getattr(layer, "prefix", None) == prefix
        if own or isinstance(layer, TrainableTokensLayer):
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            held = set(layer._get_available_adapters()) - set(layer.merged_adapters)
            names = [name for name in dict.fromkeys(wanted) if name in held]
            if names:
                plan.append(Merge(layer, names))
    return plan


def _check_names(model: nn.Module, adapter_names: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names should be a list of strings, got {shown(adapter_names)}.")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    names = set(known).union(*(layer._get_available_adapters() for layer in layers))
    unknown = [name for name in adapter_names if name not in names]
    if unknown:
        raise ValueError(
            f"adapter_names={shown(list(adapter_names))} cannot be merged: there is no adapter {shown(unknown[0])}. "
            f"Adapters of this model are {shown(sorted(names))}."
        )


def check_merges(model: nn.Module, plan: Sequence[Merge], safe_merge: bool) -> None:
    """Refuse a merge that would not be exact at one of the layers, without changing anything.

    Args:
        model: The model with adapters.
        plan: What is to be merged.
        safe_merge: Whether to look for values that are not finite.

    Raises:
        ValueError: An adapter depends on its input, a layer cannot merge it, or another adapter would be lost or
            changed.
    """
    planned = {id(merge.layer): merge.names for merge in plan}
    holders = _parameter_holders(model)
    for layer, names in ((merge.layer, merge.names) for merge in plan):
        if isinstance(layer, RoutedLayer):
            _check_routed(layer, names, planned, holders)
            with onload_layer(layer):
                layer.check_merge(names, safe_merge)
        else:
            _check_foreign(layer, names, safe_merge)


def _check_routed(
    layer: RoutedLayer, names: list[str], planned: Mapping[int, list[str]], holders: Mapping[int, list[nn.Module]]
) -> None:
    for name in names:
        if not layer.is_mergeable(name):
            raise ValueError(
                f"The adapter {shown(name)} depends on the input of {layer.place}, so no fixed weight equals it and "
                f"it cannot be merged. {WAY_OUT}"
            )
    inner: nn.Module = layer.base_layer
    while isinstance(inner, BaseTunerLayer):
        live = _live(inner, planned.get(id(inner), []))
        if live and not layer.adds_to_output:
            raise ValueError(
                f"The adapter {shown(names[0])} at {layer.place} changes what the adapter {shown(live[0])} inside it "
                "gives, which its merged weight would not. Merge that one first, or merge both with "
                "merge_and_unload()."
            )
        inner = cast(Any, inner).base_layer
    base = layer.get_base_layer()
    check_mergeable_here(base, layer.place)
    for parameter in base.parameters(recurse=False):
        if len(holders[id(parameter)]) > 1:
            raise ValueError(
                f"{layer.place} shares a weight with another module of the model, which a merge would change too. "
                "Load the base model with tie_word_embeddings=False, or give the two modules weights of their own."
            )


def _live(layer: BaseTunerLayer, merging: Sequence[str]) -> list[str]:
    """Adapters that act in a layer's forward and are not about to be merged."""
    if layer.disable_adapters:
        return []
    held = set(layer._get_available_adapters()) - set(layer.merged_adapters) - set(merging)
    return [name for name in layer.active_adapters if name in held]


def _check_foreign(layer: BaseTunerLayer, names: list[str], safe_merge: bool) -> None:
    """Refuse what a layer of peft's own would merge wrongly, or fail at halfway."""
    left = _live(layer, names)
    if isinstance(layer, TrainableTokensLayer):
        if left:
            raise ValueError(
                f"The tokens trained by the adapter {shown(left[0])} act beside those of {shown(names[0])}, and peft "
                "leaves them out once one of the two is merged. Merge both, or activate one of them first."
            )
        layer._check_overlapping_tokens([*layer.merged_adapters, *names])
    if safe_merge:
        for attribute in layer.adapter_layer_names:
            for name, part in dict(getattr(layer, attribute)).items():
                tensors = [part] if isinstance(part, torch.Tensor) else list(part.parameters())
                if name in names and not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken ({attribute})."
                    )


def merge_layers(plan: Sequence[Merge], safe_merge: bool) -> None:
    """Merge all layers of a plan that has been checked; where one fails all the same, undo the others.

    Args:
        plan: What is to be merged, in this order.
        safe_merge: Passed to the layers.
    """
    done: list[Callable[[], None]] = []
    try:
        for merge in plan:
            with onload_layer(merge.layer):
                done.append(_way_back(merge.layer))
                merge.layer.merge(safe_merge=safe_merge, adapter_names=merge.names)
    except BaseException:
        for undo in reversed(done):
            undo()
        raise


def _way_back(layer: BaseTunerLayer) -> Callable[[], None]:
    """How the merge of a layer is undone: to the last bit, but for floating point weights of this package's layers."""
    merged_before, base = list(layer.merged_adapters), layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if isinstance(layer, RoutedLayer):
        if layer.quantization_backend is None:
            return partial(layer.unmerge_to, merged_before)
        base.state_dict()  # after an evaluation on CPU it brings 4-bit weights back to their form
        # A merge makes a new weight, as the old one cannot be changed, and writes into the attributes of the old one.
        return restorer(layer, base, *base._parameters.values(), getattr(base, "state", None))
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return lambda: layer.unmerge() if layer.merged else None
    values = weight.data.clone()

    def restore() -> None:
        layer.get_base_layer().weight.data = values
        layer.merged_adapters[:] = merged_before

    return restore


def _parameter_holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that own each parameter, by its id."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    return holders


@contextmanager
def quiet_merging() -> Iterator[None]:
    """Leave out peft's warning that a layer was merged already, while layers that are merged are taken off."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged, nothing to do")
        yield
