"""Places that the adapters of a model hide from a further one: none that a first adapter would get may go missing.

peft puts no adapter inside of another one, and none on a module that `modules_to_save` trains in full. So places are
chosen a second time, in a view of the model without its adapters, and compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..messages import shown
from ..place import Place
from ..types import MoePeftWarning
from .choose import find_places, resolve_targets

if TYPE_CHECKING:
    from ..config.config import MoeConfig


def choose_places(model: nn.Module, config: MoeConfig, **quantization: Any) -> list[Place]:
    """Resolve a configuration for a model and list its places, all that it would have if it were the first adapter.

    Args:
        model: The model to adapt, with or without adapters.
        config: The configuration, whose `target_modules` is set.
        **quantization: What `peft.utils.quantization_utils.get_quantization_kwargs` says of the model.

    Raises:
        NoMatchingPeftModuleError: Nothing matches, a ValueError of peft's.
        ValueError: A match cannot be adapted, or lies inside a module that an adapter of the model wraps.
    """
    first = _places_of_a_first_adapter(model, config, quantization)
    for name in first:
        outer = _hidden_by(model, name)
        if outer is not None:
            raise ValueError(_hidden(config, name, first, outer))
    resolve_targets(model, config)
    places = find_places(model, config, **quantization)
    lost = sorted(set(first) - {place.name for place in places})
    if lost:
        raise ValueError(_hidden(config, lost[0], first, "an adapter of the model"))
    config.keep_places(places)
    return places


def without_adapters(model: nn.Module) -> nn.Module:
    """A view of a model without its adapters.

    Args:
        model: The model, which is not changed.

    Returns:
        The model itself where it has none; else a module with the same weights and names, whose wrapped modules stand
        in their old places. It is for looking at, not for calling.
    """
    return _bare(model, {})


def _bare(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    known[id(module)] = module  # of a module that holds itself
    if isinstance(module, BaseTunerLayer):
        bare = _bare(cast(nn.Module, module.base_layer), known)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        bare = _bare(cast(nn.Module, module.original_module), known)
    else:
        children = {name: child if child is None else _bare(child, known) for name, child in module._modules.items()}
        same = all(child is module._modules[name] for name, child in children.items())
        bare = module if same else _with_children(module, children)
    known[id(module)] = bare
    return bare


def _with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """A module with the same attributes and other submodules, made without running its constructor."""
    view: nn.Module = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = children
    return view


def _places_of_a_first_adapter(model: nn.Module, config: MoeConfig, quantization: dict[str, Any]) -> list[str]:
    bare = without_adapters(model)
    if bare is model:
        return []
    config = copy(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoePeftWarning)  # they come with the model itself
        resolve_targets(bare, config)
        return [place.name for place in find_places(bare, config, **quantization)]


def _hidden_by(model: nn.Module, name: str) -> str | None:
    """What keeps a further adapter from a module; None where the way to it is free.

    Args:
        model: The model.
        name: Name of the module in a model without adapters.
    """
    module, path = model, ""
    for part in name.split("."):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return f"{path}, which an adapter of the model wraps"
        module, path = module.get_submodule(part), f"{path}.{part}".lstrip(".")
    if isinstance(module, AuxiliaryTrainingWrapper):
        return "what modules_to_save or trainable_token_indices of an adapter train in full"
    return None


def _hidden(config: MoeConfig, name: str, places: Sequence[str], outer: str) -> str:
    kind = type(config).__name__
    return (
        f"{kind}: {name}, one of the {len(places)} modules that it adapts, lies inside {outer}: peft adds no further "
        f"adapter there. Put it on a base model of its own, or leave the module out with exclude_modules="
        f"{shown([name.rpartition('.')[2]])}. Nothing has been changed."
    )
