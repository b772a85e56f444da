"""What is trained beside an adapter, whole modules and embeddings of single tokens: checked before anything changes.

peft wraps these after the adapter's own layers, and skips over names that no module has.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence, Set

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..backbone.partitioned import shape_of
from ..config.config import MoeConfig
from ..messages import shown

# Heads that peft adds to `modules_to_save` for some tasks, whether the model has them or not.
ADDED_BY_PEFT = frozenset({*SEQ_CLS_HEAD_NAMES, "qa_outputs"})
# TRL adds a language model's head where a chat template brings new tokens, also to reward models, which have none.
ADDED_BY_TRL = frozenset({"lm_head"})
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def check_further_modules(config: MoeConfig, model: nn.Module) -> None:
    """Refuse `modules_to_save` and `trainable_token_indices` that cannot work.

    Args:
        config: The adapter's configuration.
        model: The model, with the adapters that it has.

    Raises:
        ValueError: A name matches nothing, or a token does not exist; the message names the nearest ones.
        TypeError: A module cannot be trained as a whole.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    kind = type(config).__name__
    saved: set[str] = set()
    added = ADDED_BY_PEFT | (ADDED_BY_TRL if config.task_type == "SEQ_CLS" else frozenset())
    for entry in config.modules_to_save or []:
        saved.update(_saved_by(entry, modules, kind, added))
    indices = config.trainable_token_indices
    if indices is None:
        return
    if isinstance(indices, Mapping):
        for layer, ids in indices.items():
            _check_tokens(layer, ids, modules, saved, kind)
        if not indices:
            raise ValueError(f"{kind}: trainable_token_indices={{}} names no layer. Write None to train no tokens.")
    else:
        _check_tokens(_input_embeddings(model, kind), indices, modules, saved, kind)


def _saved_by(entry: object, modules: Mapping[str, nn.Module], kind: str, added: Set[str]) -> list[str]:
    """The modules that an entry of `modules_to_save` makes peft train; none for an added one that the model lacks."""
    if not isinstance(entry, str) or not entry:
        raise ValueError(f"{kind}: modules_to_save holds {shown(entry)}. Write the names of modules to train in full.")
    names = [name for name in modules if name.endswith(entry)]
    if not names and entry not in added:
        raise ValueError(
            f"{kind}: modules_to_save holds {shown(entry)}, but no module of the model is called so."
            f"{_near(entry, modules)}"
        )
    for name in names:
        module = modules[name]
        if isinstance(module, (*CONTAINERS, BaseTunerLayer)):
            raise TypeError(
                f"{kind}: modules_to_save holds {shown(entry)}, which matches {name} ({type(module).__name__}), and "
                "that cannot be trained as a whole. Name the modules inside it, or others."
            )
        packed = None if isinstance(module, AuxiliaryTrainingWrapper) else _packed(module)
        if packed is not None:
            raise ValueError(
                f"{kind}: modules_to_save holds {shown(entry)}, but {name}.{packed} is quantized, so it cannot be "
                "trained. Load the base model with llm_int8_skip_modules naming it, or leave it out."
            )
    return names


def _packed(module: nn.Module) -> str | None:
    """A weight that holds packed or integer values; None where there is none."""
    for name, weight in module.named_parameters():
        if hasattr(weight, "quant_state") or not weight.is_floating_point() or weight.element_size() == 1:
            return name
    return None


def _input_embeddings(model: nn.Module, kind: str) -> str:
    """The name of the layer that embeds the tokens of a model."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embeddings = None
    name = next((name for name, module in model.named_modules() if module is embeddings), None)
    if name is None:
        raise ValueError(
            f"{kind}: trainable_token_indices needs a layer that embeds tokens, which {type(model).__name__} does not "
            "tell. Write a dict from the name of the layer to token ids."
        )
    return name


def _check_tokens(layer: object, ids: object, modules: Mapping[str, nn.Module], saved: set[str], kind: str) -> None:
    """Refuse token ids that a layer does not have."""
    names = [name for name in modules if isinstance(layer, str) and layer and name.endswith(layer)]
    if not names:
        raise ValueError(
            f"{kind}: trainable_token_indices names the layer {shown(layer)}, but no module of the model is called "
            f"so.{_near(layer, modules)}"
        )
    both = sorted(saved & set(names))
    if both:
        raise ValueError(
            f"{kind}: {both[0]} is in modules_to_save, which trains it in full, and in trainable_token_indices. Take "
            "one of the two."
        )
    rows = _rows(names[0], modules, kind)
    fits = isinstance(ids, (Sequence, set)) and not isinstance(ids, str) and len(ids) > 0
    wrong = next((i for i in ids if type(i) is not int or not 0 <= i < rows), None) if fits else ids  # type: ignore[attr-defined]
    if not fits or wrong is not None:
        raise ValueError(
            f"{kind}: trainable_token_indices={shown(ids)} must be token ids from 0 to {rows - 1}, of which "
            f"{shown(wrong)} is none. Write at least one, or None to train no tokens."
        )
    if len(set(ids)) != len(ids):  # type: ignore[call-overload, arg-type]
        raise ValueError(f"{kind}: trainable_token_indices={shown(ids)} names a token twice. Write each id once.")


def _rows(name: str, modules: Mapping[str, nn.Module], kind: str) -> int:
    """How many tokens a layer has a row for."""
    module: nn.Module = modules[name]
    for attribute in ("token_adapter", "base_layer", "original_module"):
        module = getattr(module, attribute, module)
    weight = getattr(module, "weight", None)
    if weight is None or len(shape_of(weight)) != 2:
        raise TypeError(
            f"{kind}: trainable_token_indices names {name} ({type(module).__name__}), which has no row for each "
            "token. Name an embedding layer."
        )
    return shape_of(weight)[0]


def _near(entry: object, modules: Mapping[str, nn.Module]) -> str:
    leaves = {name.rpartition(".")[2] for name in modules}
    near = difflib.get_close_matches(str(entry).rpartition(".")[2][:100], leaves)
    return f" Nearest names: {sorted(near)}." if near else " Name modules as model.named_modules() does."
