"""Which modules an adapter wraps: the places that a configuration picks in a model, and what it may not pick."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import utils as peft_utils
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..backbone.encoders import encoder_names
from ..backbone.read_weights import read_weights
from ..backbone.relative_positions import Reader, position_readers
from ..backbone.structure import find_moe_layers, is_below, layer_of, router_names
from ..config.patterns import check_patterns
from ..messages import shown, warn
from ..place import MoeLayer, Place, Rows
from .blocks import block_names, block_place, experts_names, experts_place, ffn_names, ffn_place
from .linear import (
    default_target_modules,
    leaf_names,
    linear_names,
    linear_place,
    reads_encoder_states,
    shortest_endings,
    text_linear_names,
)
from .sharing import share_decisions

if TYPE_CHECKING:
    from ..config.config import MoeConfig

# peft 0.20 raises a plain ValueError where nothing matches.
NoMatchingPeftModuleError: type[ValueError] = getattr(peft_utils, "NoMatchingPeftModuleError", ValueError)
DUMMY_TARGETS = "dummy-target-modules"


def resolve_targets(model: nn.Module, config: MoeConfig) -> None:
    """Fill in `target_modules` where the configuration leaves the choice to us: None and "all-linear".

    Args:
        model: The model to adapt.
        config: Its `target_modules` is set.

    Raises:
        ValueError: It is None, and the model has no structure to choose by; or `layers_to_transform` and
            `layers_pattern` would have no effect.
    """
    config.recheck()
    check_patterns(config, dict(model.named_modules()))
    _check_layer_selection(config)
    layers = find_moe_layers(model)
    config.resolve(model, layers)
    targets = config.target_modules
    if config.placement in NAMES and (targets is None or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND):
        names = NAMES[config.placement](model, [layer for layer in layers if config.adapts(layer)])
        config.target_modules = set(shortest_endings(names, set(dict(model.named_modules())) - set(names)))  # type: ignore[assignment]
    elif targets is None:
        if not hasattr(getattr(model, "config", None), "model_type"):
            raise ValueError(
                f"Please specify `target_modules` in {type(config).__name__}: {type(model).__name__} is not a "
                "transformers model, so there are no places to choose by default."
            )
        config.target_modules = set(default_target_modules(model, config.default_targets))  # type: ignore[assignment]
    elif isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        # Endings, as peft takes a full name whatever its layer.
        names = linear_names(model)
        config.target_modules = set(shortest_endings(names, set(dict(model.named_modules())) - set(names)))  # type: ignore[assignment]


def _check_layer_selection(config: MoeConfig) -> None:
    """Refuse a choice of layers that peft would not look at."""
    targets, (layers, pattern) = config.target_modules, config.layer_selection
    kind = type(config).__name__
    if layers is None and pattern:
        raise ValueError(
            f"{kind}: layers_pattern={shown(pattern)} has no effect without layers_to_transform; set both."
        )
    if layers == []:
        raise ValueError(f"{kind}: layers_to_transform=[] names no layer. Write None for all layers, or some indices.")
    regex = isinstance(targets, str) and targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND
    if regex and layers is not None:
        raise ValueError(
            f"{kind}: layers_to_transform={shown(layers)} has no effect on target_modules={shown(targets)}, a "
            "regex of full names. Write the layers into it, as in r'.*layers\\.(0|1)\\..*_proj', or give a list of "
            "names."
        )


def find_places(model: nn.Module, config: MoeConfig, **quantization: Any) -> list[Place]:
    """List the layers a configuration matches, without changing anything.

    Args:
        model: The model to adapt.
        config: A configuration whose `target_modules` is resolved.
        **quantization: What `peft.utils.quantization_utils.get_quantization_kwargs` says of the model.

    Raises:
        NoMatchingPeftModuleError: Nothing matches, a ValueError of peft's.
        ValueError: A match is a router or cannot be adapted; nearest valid names are given.
    """
    if config.target_modules in (DUMMY_TARGETS, {DUMMY_TARGETS}):
        return []
    routers, modules, layers = router_names(model), dict(model.named_modules()), find_moe_layers(model)
    encoders, read, readers = encoder_names(model), read_weights(model), position_readers(model)
    places: list[Place] = []
    inside: set[str] = set()
    taken: set[str] = set()
    excluded = unmatched = False
    for name, module in modules.items():
        if not name or is_below(name.rpartition(".")[0], inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside.add(name)
        match = check_target_module_exists(config, name)
        if not match:
            left_out = match is not None and match is not False
            excluded, unmatched = excluded or left_out, unmatched or not left_out
            continue
        _refuse_router(name, routers)
        if is_below(name, taken):
            raise ValueError(f"target_modules matches {name}, which lies inside another match; name only one of both.")
        _refuse_read(name, read)
        if config.placement in ("block", "ffn"):
            _refuse_adapted_parts(name, module)
        _refuse_trained_parts(name, module, config.modules_to_save or [])
        place = PLACES[config.placement](name, module, layers, quantization)
        index, num_layers = layer_of(name, modules) or (place.layer_index, None)
        places.append(replace(place, rows=_rows(name, encoders, readers), layer_index=index, num_layers=num_layers))
        taken.add(name)
    if not places:
        raise NoMatchingPeftModuleError(_all_excluded(unmatched) if excluded else _no_match(model, config))
    _warn_of_unknown(config, modules)
    return share_decisions(places) if config.shares_decisions else places


def _warn_of_unknown(config: MoeConfig, modules: Collection[str]) -> None:
    """Warn of targets that no module is called, while others are adapted; peft says nothing then."""
    targets = config.target_modules
    names = [] if targets is None or isinstance(targets, str) else sorted(targets)
    unknown = [target for target in names if not any(f".{name}".endswith(f".{target}") for name in modules)]
    if unknown:
        warn(
            f"target_modules names {shown(unknown)}, but no module of the model is called so; only the others are "
            "adapted. Correct the names, or remove them; moe_peft.describe(model, config) lists what is adapted."
        )


def _rows(name: str, encoders: set[str], readers: Mapping[str, Reader]) -> Rows:
    if is_below(name, {one for one, reader in readers.items() if reader == "positions"}):
        return "positions"
    if name in readers:
        return readers[name]
    if is_below(name, encoders):
        return "media"
    return "encoder_states" if reads_encoder_states(name) else "tokens"


def _refuse_router(name: str, routers: set[str]) -> None:
    if is_below(name, routers):
        raise ValueError(
            f"target_modules matches {name}, which belongs to a router of the backbone; adapting it would change "
            "which of the backbone's own experts are used. Name other modules, or add it to exclude_modules."
        )


def _refuse_read(name: str, read: Mapping[str, str]) -> None:
    if name in read:
        raise ValueError(
            f"target_modules matches {name}, whose weight {read[name]} reads without calling it, in every pass or in "
            "some (fused kernels, caches), so that an adapter there would have no effect. Name other modules, or add "
            "it to exclude_modules."
        )


def _refuse_adapted_parts(name: str, block: nn.Module) -> None:
    parts = [part for part, module in block.named_modules() if part and isinstance(module, BaseTunerLayer)]
    if parts:
        raise ValueError(
            f"{name} contains layers with adapters of their own ({', '.join(parts[:3])}). Wrapping the block would "
            "rename what they save. Put the adapter around the block on a base model of its own."
        )


def _refuse_trained_parts(name: str, module: nn.Module, modules_to_save: list[str]) -> None:
    for part, _ in module.named_modules():
        if part and f"{name}.{part}".endswith(tuple(modules_to_save)):
            raise ValueError(
                f"modules_to_save={shown(modules_to_save)} matches {name}.{part}, which lies inside {name}, where an "
                "adapter wraps the whole module and peft keeps no trained copy of a part. Name modules outside, or "
                "take a configuration that wraps the experts alone, which leaves a block's router outside."
            )


def _all_excluded(unmatched: bool) -> str:
    """In peft's words, as its users look for them."""
    fields = "`target_modules`, `exclude_modules` and `modules_to_save` configuration"
    if not unmatched:
        return f"All modules were excluded. This is likely unintended. Check your {fields}."
    return (
        "No modules were targeted for adaptation. This might be caused by a combination of mismatched target modules "
        f"and excluded modules. Please check your {fields}."
    )


def experts_or_linear_place(
    name: str, module: nn.Module, layers: list[MoeLayer], quantization: dict[str, Any]
) -> Place:
    """Describe an experts module, or a linear layer beside it; arguments as in `block_place`."""
    of_experts = any(layer.experts == name for layer in layers)
    return (experts_place if of_experts else linear_place)(name, module, layers, quantization)


def _no_match(model: nn.Module, config: MoeConfig) -> str:
    targets = config.target_modules
    kind, names = "Linear layers", linear_names(model)
    if config.placement in NAMES:
        kind = {"block": "Blocks", "ffn": "Gated FFNs"}.get(config.placement, "Experts modules")
        names = NAMES[config.placement](model, find_moe_layers(model))
    leaves = leaf_names(names)
    wanted = [targets] if isinstance(targets, str) else sorted(targets or [])
    near = {match for name in wanted for match in difflib.get_close_matches(name.rpartition(".")[2], leaves)}
    hint = f"Nearest names: {sorted(near)}. " if near - set(wanted) else ""
    layers, default = "", " Leave target_modules None to take them all." if config.placement in NAMES else ""
    indices, _ = config.layer_selection
    if indices is not None:
        layers = f" in the layers {shown(indices)} (layers_to_transform; layers_pattern says which list it counts in)"
    return (
        f"Target modules {shown(targets)} not found in the base model{layers}. {hint}"
        f"{kind} of {type(model).__name__} are called {leaves}.{default}"
    )


# Kind of placement -> description of a matched module, for the layer of the same name in `layers.LAYERS`.
PLACES: dict[str, Callable[..., Place]] = {
    "linear": linear_place,
    "scaled": linear_place,
    "block": block_place,
    "ffn": ffn_place,
    "experts": experts_place,
    "slices": experts_place,
    "matrices": experts_or_linear_place,
}
# Kind of placement -> names of all modules of that kind, for kinds whose default places are all of them.
NAMES: dict[str, Callable[[nn.Module, list[MoeLayer]], list[str]]] = {
    "block": lambda model, layers: block_names(model, layers, text_linear_names(model)),
    "ffn": ffn_names,
    "experts": experts_names,
    "slices": experts_names,
    "matrices": experts_names,
}
