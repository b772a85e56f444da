"""What an adapter may not be, given the model and the adapters that are there: refused before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..backbone.encoders import encoder_names, encoder_pattern
from ..config.adapter_files import check_values
from ..config.config import MoeConfig
from ..layers import LAYERS, AdaptedExperts, RoutedLayer, SlicedExperts
from ..messages import shown, warn
from ..place import Place
from .tensors import PEFT_PREFIX, plain_name

# In the names of what peft trains beside an adapter.
BESIDE = (".modules_to_save.", ".token_adapter.")


def check_neighbours(config: MoeConfig, prefix: str, places: Sequence[Place], model: nn.Module) -> None:
    """Refuse an adapter that cannot share a module with the one that is there; warn where it wraps another type's.

    Args:
        config: The adapter's configuration.
        prefix: What the attributes of the adapter's type begin with.
        places: Where it is put.
        model: The model, with the adapters that it has.

    Raises:
        ValueError: The two compute in different ways, or one of them stands for copies of the backbone's experts.
    """
    others = []
    for place in places:
        layer_cls = LAYERS[config.placement_at(place)]
        target = model.get_submodule(place.name)
        if isinstance(target, RoutedLayer) and target.prefix == prefix:
            if type(target) is not layer_cls:
                raise ValueError(
                    f"{place.name} has an adapter of another kind, which cannot share its layer with {config.method} "
                    f"({config.summary()}). Put this adapter on a base model of its own."
                )
        elif isinstance(target, BaseTunerLayer):
            if SlicedExperts in (layer_cls, type(target)):
                raise ValueError(
                    f"{place.name} has an adapter of another type, around which {config.method} ({config.summary()}) "
                    "cannot stand: an adapter inside copies of experts is not given their weights, and copies inside "
                    "another adapter are saved under a name that a base model does not have. Put this adapter on a "
                    "base model of its own."
                )
            if layer_cls is AdaptedExperts and isinstance(target, ParamWrapper):
                raise ValueError(
                    f"{place.name} has LoRA on its parameters, which {config.method} ({config.summary()}) would "
                    "compute without. Put both on the same adapter type, or merge the one that is there."
                )
            others.append(place.name)
    if others:
        warn(
            f"{others[0]} (and {len(others) - 1} more) has an adapter of another type, which {config.method} wraps "
            "from here on: what that adapter then saves has other names, and does not load on a base model of its "
            "own. Save it before, or adapt other modules."
        )


def check_groups(config: MoeConfig, places: Sequence[Place], model: nn.Module) -> None:
    """Refuse sample groups that a model cannot bring, where experts belong to groups of samples.

    Args:
        config: The adapter's configuration.
        places: Where it is put.
        model: The model.

    Raises:
        ValueError: A place reads images, sound or positions, or the groups' column is one of the model's inputs.
    """
    columns = [column for column, groups in config.group_columns.items() if groups]
    for column in columns:
        if column in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"group_column={shown(column)} is an input of {type(model).__name__}, which would not be given it any "
                "more. Name a column of the sample groups alone, as group_column='task_type'."
            )
    media = [place.name for place in places if place.rows == "media"]
    if columns and media:
        raise ValueError(
            f"expert_groups needs the group of every row, or the router does, but {media[0]} reads images or sound, "
            "which do not tell the sample they belong to. Set "
            f"exclude_modules={encoder_pattern(encoder_names(model))!r}, target_modules=None, which leaves encoders "
            "out, or expert_groups=None."
        )
    shared = [place.name for place in places if place.rows in ("positions", "tokens_and_positions")]
    if columns and shared:
        raise ValueError(
            f"expert_groups needs the group of every row, or the router does, but {shared[0]} reads embeddings of "
            "relative positions, which belong to no sample. Name it in exclude_modules, or set expert_groups=None."
        )


def check_leftovers(
    config: MoeConfig, adapter_name: str, prefix: str, places: Sequence[Place], model: nn.Module
) -> None:
    """Refuse an adapter where one of the same name would stay behind at other modules.

    `get_peft_model` does not ask whether the model has an adapter already. One that acts at a place the new
    configuration does not know would be neither saved with it nor loaded again.

    Args:
        config: The adapter's configuration.
        adapter_name: Its name.
        prefix: What the attributes of the adapter's type begin with.
        places: Where it is put.
        model: The model, with the adapters that it has.

    Raises:
        ValueError: An adapter of this name stands elsewhere.
    """
    chosen = {place.name for place in places}
    endings = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        if isinstance(module, RoutedLayer):
            left = adapter_name in module.experts and not (module.prefix == prefix and name in chosen)
        else:
            left = isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters
            left = left and isinstance(module, ModulesToSaveWrapper) and not name.endswith(endings or ("\0",))
        if left:
            raise ValueError(
                f"The model has an adapter {shown(adapter_name)} already, at {name}, where the new configuration puts "
                "none: it would go on acting there, but not be saved. Remove it with base = model.unload(), or load "
                "the base model again; or give the new adapter another adapter_name. Nothing has been changed."
            )


def check_tensors(
    prefix: str,
    model: nn.Module,
    own: Mapping[str, tuple[int, ...]],
    loaded: Mapping[str, torch.Tensor],
    embeddings: Set[str] = frozenset(),
) -> None:
    """Refuse an adapter's weights that are not those of the model's places, before any of them is copied.

    Args:
        prefix: What the attributes of the adapter's type begin with.
        model: The model.
        own: Shapes of the adapter's tensors by the model's names.
        loaded: The adapter's weights by the model's names.
        embeddings: Names of the base model's weights that peft saves with an adapter of a resized vocabulary.

    Raises:
        TypeError: One is no tensor.
        ValueError: One is missing, has no place, another shape, no finite numbers, or is of the base model.
    """
    missing = sorted(own.keys() - loaded.keys())
    if missing:
        raise ValueError(
            f"The adapter's weights lack {len(missing)} of {len(own)} tensors, the first is {missing[0]}. The file is "
            "incomplete, or it was saved for another base model or other target_modules. No weight has been changed."
        )
    foreign = loaded.keys() - own.keys()
    extra = sorted(key for key in foreign if f".{prefix}" in key)
    if extra:
        raise ValueError(
            f"The adapter's weights hold {len(extra)} tensors more than this model has places for, the first is "
            f"{extra[0]}. It was saved for a base model of more layers, or for other modules. No weight has been "
            "changed."
        )
    present = {_inner(key) for key in model.state_dict()}
    of_base = present - {_inner(key) for key in embeddings}
    base = sorted(key for key in foreign if _inner(key) in of_base and not any(part in key for part in BESIDE))
    if base:
        raise ValueError(
            f"The adapter's weights hold {shown(base[0])} (and {len(base) - 1} more), which is a weight of the base "
            "model. Take it out, and load it with model.load_state_dict if it is meant. No weight has been changed."
        )
    # peft saves what wraps an embedding twice where the vocabulary has grown, once by the name of the base's weight.
    twice = tuple(f"{_layer_of(name)}{part}" for name in embeddings for part in BESIDE)
    homeless = sorted(key for key in foreign if _inner(key) not in present and not key.startswith(twice))
    if homeless:
        raise ValueError(
            f"The adapter's weights hold {shown(homeless[0])} (and {len(homeless) - 1} more), for which the model has "
            "no place. Take it out, or load the adapter that it belongs to. No weight has been changed."
        )
    check_values("The adapter's state dict", loaded, own)
    for key, shape in own.items():
        if tuple(loaded[key].shape) != shape:
            raise ValueError(
                f"The adapter's tensor {key} has the shape {tuple(loaded[key].shape)}, but this model needs {shape}. "
                "It was saved for a base model of other widths, or with another r or num_experts. No weight has been "
                "changed."
            )


def whole_embeddings(embeddings: Set[str], loaded: Mapping[str, torch.Tensor]) -> Set[str]:
    """The embeddings that a state dict in memory may hold, of which no file says that they were saved on purpose.

    peft saves those of a resized vocabulary all together: one alone is a weight of the base model.

    Args:
        embeddings: Names of their weights.
        loaded: The state dict.

    Returns:
        The names; none where one of the layers is missing.
    """
    layers = {_layer_of(_inner(name)) for name in embeddings}
    return embeddings if layers <= {_layer_of(_inner(key)) for key in loaded} else frozenset()


def _layer_of(weight: str) -> str:
    """The layer whose weight it is, without what peft puts around it."""
    for part in (".original_module", *BESIDE):
        weight = weight.partition(part)[0] if part in weight else weight
    return weight.removesuffix(".weight")


def _inner(key: str) -> str:
    return plain_name(key).removeprefix(PEFT_PREFIX)
