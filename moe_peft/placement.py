"""Which modules an adapter wraps: the linear layers of a model, their kinds, and the places a configuration picks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .backbone import base_of, find_moe_layers, is_below, router_names
from .block_places import block_names, block_place, experts_names, experts_place
from .modalities import encoder_names
from .types import MoeLayer, Place, Rows

if TYPE_CHECKING:
    from .config import MoeConfig

# Second projections of gated FFNs: they scale what the first one lets through, and the kind "all" leaves them out.
UNGATED_NAMES = ("up_proj", "wi_1")
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
CROSS_ATTENTION = re.compile(r"encdecattention|encoder_attn|cross_?attn|crossattention", re.IGNORECASE)
DUMMY_TARGETS = "dummy-target-modules"


def linear_features(module: nn.Module, **quantization: Any) -> tuple[int, int] | None:
    """Input and output width of a linear layer, plain or quantized; None for any other module.

    Args:
        module: Module or tuner layer around one.
        **quantization: What `peft.utils.quantization_utils.get_quantization_kwargs` says of the model.
    """
    base = base_of(module)
    if hasattr(base, "n_groups"):  # block-diagonal, as in DeepSeek-V4: its input has an axis of groups
        return None
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    backend = resolve_quantization_backend(base, **quantization)
    if backend is not None and backend.layer_type == "linear" and hasattr(base, "in_features"):
        return cast(tuple[int, int], (base.in_features, base.out_features))
    return None


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers an adapter may wrap: none below a router or a tuner layer, nor the output head."""
    heads = _output_heads(model)
    routers = router_names(model)
    names: list[str] = []
    inside: set[str] = set()
    for name, module in model.named_modules():
        if not name or is_below(name, inside):
            continue
        if isinstance(module, (BaseTunerLayer, nn.MultiheadAttention)):
            inside.add(name)
        base = base_of(module)
        if linear_features(module) is not None and base not in heads and not is_below(name, routers):
            names.append(name)
    return names


def text_linear_names(model: nn.Module) -> list[str]:
    """Those of `linear_names` that belong to no encoder of images or sound, of which adapters choose their places."""
    encoders = encoder_names(model)
    return [name for name in linear_names(model) if not is_below(name, encoders)]


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """The layer that predicts tokens, or that classifies or scores a sequence."""
    # A multi-modal model may leave the head to its language model.
    parts = [model, *(part for part in model.modules() if isinstance(part, PreTrainedModel))]
    heads = [cast(Any, part).get_output_embeddings() for part in parts if hasattr(part, "get_output_embeddings")]
    if not any(isinstance(head, nn.Module) for head in heads):
        heads = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    return [head for head in heads if isinstance(head, nn.Module)]


def default_target_modules(model: nn.Module, kind: str) -> list[str]:
    """Linear layers of the decoder (or encoder) blocks of the language model, by what they belong to.

    Args:
        model: A transformers model.
        kind: "ffn" for what lies outside attention, "attention" for what lies inside, "all" for both without the
            second projection of gated FFNs.

    Returns:
        Shortest name endings that match these layers and no other linear layer.

    Raises:
        ValueError: The model has no such layer, as an FFN of fused experts.
    """
    linears = [name for name in text_linear_names(model) if re.search(r"\.\d+\.", name)]
    attention = {name for name in linears if ATTENTION.search(name)}
    if kind == "attention":
        chosen = attention
    elif kind == "ffn":
        chosen = set(linears) - attention
    else:
        chosen = {name for name in linears if name.rpartition(".")[2] not in UNGATED_NAMES}
    if not chosen:
        sparse = " Its FFNs are mixtures of fused experts; adapters around blocks or experts reach those."
        raise ValueError(
            f"{type(model).__name__} has no linear layer of the kind {kind!r} to adapt. Please specify "
            f"`target_modules`; its linear layers are called {_leaves(text_linear_names(model))}."
            f"{sparse if find_moe_layers(model) else ''}"
        )
    return shortest_endings(chosen, set(dict(model.named_modules())) - chosen)


def shortest_endings(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Shortest dotted endings that together match all names and none of the others, sorted."""
    other_endings = {ending for name in others for ending in _endings(name)}
    return sorted({next((e for e in _endings(name) if e not in other_endings), name) for name in names})


def resolve_targets(model: nn.Module, config: MoeConfig) -> None:
    """Fill in `target_modules` where the configuration leaves the choice to us: None and "all-linear".

    Args:
        model: The model to adapt.
        config: Its `target_modules` is set.

    Raises:
        ValueError: It is None, and the model has no structure to choose by; or `layers_to_transform` and
            `layers_pattern` would have no effect.
    """
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
    targets, layers, pattern = config.target_modules, config.layers_to_transform, config.layers_pattern
    kind = type(config).__name__
    if layers is None and pattern:
        raise ValueError(f"{kind}: layers_pattern={pattern!r} has no effect without layers_to_transform; set both.")
    if layers == []:
        raise ValueError(f"{kind}: layers_to_transform=[] names no layer. Write None for all layers, or some indices.")
    regex = isinstance(targets, str) and targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND
    if regex and layers is not None:
        raise ValueError(
            f"{kind}: layers_to_transform={layers!r} has no effect on target_modules={targets!r}, a regex of full "
            "names. Write the layers into it, as in r'.*layers\\.(0|1)\\..*_proj', or give a list of names."
        )


def find_places(model: nn.Module, config: MoeConfig, **quantization: Any) -> list[Place]:
    """List the layers a configuration matches, without changing anything.

    Args:
        model: The model to adapt.
        config: A configuration whose `target_modules` is resolved.
        **quantization: What `peft.utils.quantization_utils.get_quantization_kwargs` says of the model.

    Raises:
        ValueError: Nothing matches, or a match is a router or cannot be adapted; nearest valid names are given.
    """
    if config.target_modules in (DUMMY_TARGETS, {DUMMY_TARGETS}):
        return []
    routers, modules, layers = router_names(model), dict(model.named_modules()), find_moe_layers(model)
    encoders = encoder_names(model)
    places: list[Place] = []
    inside: set[str] = set()
    taken: set[str] = set()
    excluded = False
    for name, module in modules.items():
        if not name or is_below(name.rpartition(".")[0], inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.add(name)
        match = check_target_module_exists(config, name)
        if not match:
            excluded = excluded or (match is not None and match is not False)
            continue
        _refuse_router(name, routers)
        if is_below(name, taken):
            raise ValueError(f"target_modules matches {name}, which lies inside another match; name only one of both.")
        if isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention):
            raise ValueError(
                f"Target module {name} belongs to torch.nn.MultiheadAttention, which reads its weight without calling "
                "it, so an adapter there would have no effect. Remove it from target_modules."
            )
        if config.placement == "block":
            _refuse_adapted_parts(name, module)
        _refuse_trained_parts(name, module, config.modules_to_save or [])
        place = PLACES[config.placement](name, module, layers, quantization)
        places.append(replace(place, rows=_rows(name, encoders)))
        taken.add(name)
    if not places and not excluded:
        raise ValueError(_no_match(model, config))
    return places


def _rows(name: str, encoders: set[str]) -> Rows:
    if is_below(name, encoders):
        return "media"
    return "encoder_states" if reads_encoder_states(name) else "tokens"


def reads_encoder_states(name: str) -> bool:
    """Whether a layer is a key or value projection of cross-attention, whose input has the encoder's length."""
    leaf = name.rpartition(".")[2]
    # GPT-2's c_attn holds keys and values in cross-attention, and queries too elsewhere.
    return bool(CROSS_ATTENTION.search(name)) and (leaf[:1] in ("k", "v") or leaf == "c_attn")


def _linear_place(name: str, module: nn.Module, layers: list[MoeLayer], quantization: dict[str, Any]) -> Place:
    features = linear_features(module, **quantization)
    base = base_of(module)
    if features is None:
        raise TypeError(
            f"Target module {name} ({type(base).__name__}) is not supported. Currently, only `torch.nn.Linear` "
            "(optionally quantized) and transformers' `Conv1D` can be adapted; remove it from target_modules."
        )
    return Place(name, *features, kind=type(base).__name__)


def _refuse_router(name: str, routers: set[str]) -> None:
    if is_below(name, routers):
        raise ValueError(
            f"target_modules matches {name}, which belongs to a router of the backbone; adapting it would change "
            "which of the backbone's own experts are used. Name other modules, or add it to exclude_modules."
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
                f"modules_to_save={modules_to_save!r} matches {name}.{part}, which lies inside {name}, where an "
                "adapter wraps the whole module and peft keeps no trained copy of a part. Name modules outside, or "
                "take an adapter around the experts alone (PERFT variant 'E'), which leaves a block's router outside."
            )


def _no_match(model: nn.Module, config: MoeConfig) -> str:
    targets = config.target_modules
    outer = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, _ in model.named_modules():
        if is_below(name.rpartition(".")[0], outer) and check_target_module_exists(config, name):
            return (
                f"Target modules {targets} lie inside modules that an adapter wraps already ({name}), where peft adds "
                "no further one. Put the adapter on a base model of its own."
            )
    kind, names = "Linear layers", linear_names(model)
    if config.placement in NAMES:
        kind = "Experts modules" if config.placement != "block" else "Blocks"
        names = NAMES[config.placement](model, find_moe_layers(model))
    leaves = _leaves(names)
    wanted = [targets] if isinstance(targets, str) else sorted(targets or [])
    near = {match for name in wanted for match in difflib.get_close_matches(name.rpartition(".")[2], leaves)}
    hint = f"Nearest names: {sorted(near)}. " if near - set(wanted) else ""
    layers, default = "", " Leave target_modules None to take them all." if config.placement in NAMES else ""
    if config.layers_to_transform is not None:
        layers = f" in the layers {config.layers_to_transform} (layers_pattern names the list that is counted)"
    return (
        f"Target modules {targets} not found in the base model{layers}. {hint}"
        f"{kind} of {type(model).__name__} are called {leaves}.{default}"
    )


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


# Kind of placement -> description of a matched module, for the layer of the same name in `layers.LAYERS`.
PLACES: dict[str, Callable[..., Place]] = {
    "linear": _linear_place,
    "scaled": _linear_place,
    "block": block_place,
    "experts": experts_place,
    "slices": experts_place,
}
# Kind of placement -> names of all modules of that kind, for kinds whose default places are all of them.
NAMES: dict[str, Callable[[nn.Module, list[MoeLayer]], list[str]]] = {
    "block": lambda model, layers: block_names(model, layers, text_linear_names(model)),
    "experts": experts_names,
    "slices": experts_names,
}
