"""Linear layers of a model: which ones an adapter may wrap, what they belong to, and the shortest names for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..backbone.attention import attention_names
from ..backbone.encoders import encoder_names
from ..backbone.offloaded import onloaded
from ..backbone.partitioned import gathered, is_partitioned
from ..backbone.read_weights import read_weights
from ..backbone.relative_positions import below_positions
from ..backbone.split_linear import is_split, why_not_whole
from ..backbone.structure import base_of, find_moe_layers, is_below, router_names
from ..messages import shown
from ..place import MoeLayer, Place

# Second projections of gated FFNs: they scale what the first one lets through, and the kind "all" leaves them out.
UNGATED_NAMES = ("up_proj", "wi_1")
# How transformers calls attention to the states of an encoder; Perceiver's `cross_attention` is to its own inputs.
CROSS_ATTENTION = re.compile(
    r"encdecattention|encoder_attn|cross_?attn|crossattention|encoder_decoder_attention|cross_attention\.[kv]_",
    re.IGNORECASE,
)
# Parts of sparse attention that choose the tokens to attend to: no gradient passes their choice.
INDEXER = re.compile(r"(^|\.)index(er|_\w+)(\.|$)")


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
        return base.nx, base.nf
    backend = resolve_quantization_backend(base, **quantization)
    if backend is not None and backend.layer_type == "linear" and hasattr(base, "in_features"):
        return cast(tuple[int, int], (base.in_features, base.out_features))
    return None


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers an adapter may wrap.

    None below a router or a tuner layer, nor an output head, nor those that choose the tokens of sparse attention, nor
    those whose weight is read where they are not called, nor those that read relative positions alone.
    """
    heads = _output_heads(model)
    others = router_names(model) | set(read_weights(model)) | below_positions(model)
    names: list[str] = []
    inside: set[str] = set()
    for name, module in model.named_modules():
        if not name or is_below(name, inside):
            continue
        base = base_of(module)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or base in heads:
            inside.add(name)
        left_out = base in heads or is_below(name, others) or INDEXER.search(name)
        if linear_features(module) is not None and not left_out:
            names.append(name)
    return names


def text_linear_names(model: nn.Module) -> list[str]:
    """Those of `linear_names` that belong to no encoder of images or sound, of which adapters choose their places."""
    encoders = encoder_names(model)
    return [name for name in linear_names(model) if not is_below(name, encoders)]


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """The layers that predict tokens, or that classify or score a sequence, a token or a span.

    Beside a backbone these are the output embeddings, linear layers of the model itself, and what is called like a
    classifier, with all its layers.
    """
    # A multi-modal model may leave the head to its language model.
    parts = [model, *(part for part in model.modules() if isinstance(part, PreTrainedModel))]
    heads = [cast(Any, part).get_output_embeddings() for part in parts if hasattr(part, "get_output_embeddings")]
    for part in parts:
        backbone = getattr(part, "base_model", None)
        if isinstance(backbone, nn.Module) and backbone is not part:
            heads.extend(child for child in part.children() if linear_features(child) is not None)
    heads.extend(getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES)
    return [base_of(head) for head in heads if isinstance(head, nn.Module)]


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
    inside = attention_names(model)
    attention = {name for name in linears if is_below(name, inside)}
    if kind == "attention":
        chosen = attention
    elif kind == "ffn":
        chosen = set(linears) - attention
    else:
        chosen = {name for name in linears if name.rpartition(".")[2] not in UNGATED_NAMES}
    if not chosen:
        sparse = (
            " Its FFNs are mixtures of fused experts: take a configuration that wraps blocks or experts "
            "(docs/moe_backbones.md), or target_modules='all-linear' for the linear layers that are left."
        )
        raise ValueError(
            f"{type(model).__name__} has no linear layer of the kind {shown(kind)} to adapt. Please specify "
            f"`target_modules`; its linear layers are called {leaf_names(text_linear_names(model))}."
            f"{sparse if find_moe_layers(model) else ''}"
        )
    return shortest_endings(chosen, set(dict(model.named_modules())) - chosen)


def shortest_endings(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Shortest dotted endings that together match all names and none of the others, sorted."""
    other_endings = {ending for name in others for ending in _endings(name)}
    return sorted({next((e for e in _endings(name) if e not in other_endings), name) for name in names})


def linear_place(name: str, module: nn.Module, layers: list[MoeLayer], quantization: dict[str, Any]) -> Place:
    """Describe a matched linear layer.

    Args:
        name: Full module name.
        module: The layer, or a tuner layer around it.
        layers: Sparse layers of the model.
        quantization: What `peft.utils.quantization_utils.get_quantization_kwargs` says of the model.

    Raises:
        TypeError: It is no linear layer.
        ValueError: Tensor parallelism splits it in a way that adapters cannot follow.
    """
    features = linear_features(module, **quantization)
    base = base_of(module)
    if features is None:
        raise TypeError(
            f"Target module {name} ({type(base).__name__}) is not supported. Currently, only `torch.nn.Linear` "
            "(optionally quantized) and transformers' `Conv1D` can be adapted; remove it from target_modules."
            f"{_around(name, layers)}"
        )
    if is_split(base) and (reason := why_not_whole(base)) is not None:
        raise ValueError(
            f"{name} ({type(base).__name__}) {reason}, which adapters cannot follow. Leave it out of "
            "target_modules, or give it another style in DistributedConfig(tp_plan=...)."
        )
    return Place(name, *features, kind=type(base).__name__, weight=partial(_weight_of, base, quantization))


def _weight_of(base: nn.Module, quantization: dict[str, Any]) -> torch.Tensor:
    """(O, D) weight of a linear layer, dequantized where it is quantized, with values that are elsewhere."""
    away = any(own.is_meta or is_partitioned(own) for own in base.parameters(recurse=False))
    with gathered(base), onloaded(base):
        weight = _weight_here(base, quantization)
        return weight.clone() if away else weight


def _weight_here(base: nn.Module, quantization: dict[str, Any]) -> torch.Tensor:
    if isinstance(base, Conv1D):
        return base.weight.data.T
    backend = resolve_quantization_backend(base, **quantization)
    if backend is None:
        return cast(torch.Tensor, base.weight.data)
    base.state_dict()  # undoes the form of 4-bit weights that evaluation on some CPUs makes
    return backend.get_base_weight(base)


def _around(name: str, layers: list[MoeLayer]) -> str:
    """What wraps a part of a sparse layer instead; nothing for other modules."""
    if any(name == layer.experts for layer in layers):
        return " For experts modules take a configuration that wraps experts (docs/moe_backbones.md)."
    if any(layer.experts.startswith(f"{name}.") and name == layer.block for layer in layers):
        return " For mixture-of-experts blocks take a configuration that wraps blocks (docs/moe_backbones.md)."
    return ""


def reads_encoder_states(name: str) -> bool:
    """Whether a layer is a key or value projection of cross-attention, whose input has the encoder's length."""
    leaf = name.rpartition(".")[2]
    # GPT-2's c_attn holds keys and values in cross-attention, and queries too elsewhere.
    return bool(CROSS_ATTENTION.search(name)) and (leaf[:1] in ("k", "v") or leaf == "c_attn")


def leaf_names(names: Iterable[str]) -> list[str]:
    """Last parts of module names, each once, sorted."""
    return sorted({name.rpartition(".")[2] for name in names})


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
