"""Places of adapters that wrap more than a linear layer: mixture-of-experts blocks, plain MLPs, experts modules."""

from __future__ import annotations

import re
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..backbone.attention import attention_names
from ..backbone.encoders import encoder_names
from ..backbone.experts_call import has_local_indices
from ..backbone.gated_ffn import gated_ffn
from ..backbone.structure import base_of, block_width, is_below, opaque_blocks, unsupported_reason
from ..place import MoeLayer, Place


def block_names(model: nn.Module, layers: list[MoeLayer], linears: list[str]) -> list[str]:
    """The blocks of a model: mixture-of-experts blocks where it has some, or else the MLPs of its layers.

    Where a decoder layer owns router and experts itself, the experts module stands for the block.

    Args:
        model: A transformers model.
        layers: Its sparse layers.
        linears: Names of the linear layers of its language model.

    Returns:
        Full module names.

    Raises:
        ValueError: It has neither.
    """
    modules = {name: base_of(module) for name, module in model.named_modules()}
    sparse = {*(layer.block or layer.experts for layer in layers), *opaque_blocks(model)}
    if sparse:
        return [name for name in modules if name in sparse]
    attention = attention_names(model)
    parents = {name.rpartition(".")[0] for name in linears if not is_below(name, attention)}
    # The linear layers of a block that another adapter wraps cannot be seen.
    wrapped = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    encoders = encoder_names(model)
    parents |= {name for name in wrapped if not is_below(name, encoders)}
    blocks = [name for name in parents if re.search(r"\.\d+\.", f"{name}.") and not name.rpartition(".")[2].isdigit()]
    found = [name for name in modules if name in blocks and _is_mlp(modules[name])]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no block that an adapter can wrap: its layers have no MLP module that maps "
            "hidden states to the same width. Name modules in `target_modules`, or use an adapter of linear layers."
        )
    return found


def ffn_names(model: nn.Module, layers: list[MoeLayer]) -> list[str]:
    """The gated FFNs of a language model's layers, outside of mixture-of-experts blocks.

    Args:
        model: A transformers model.
        layers: Its sparse layers.

    Raises:
        ValueError: It has none.
    """
    others = attention_names(model) | encoder_names(model) | {layer.block or layer.experts for layer in layers}
    found = [
        name
        for name, module in model.named_modules()
        if re.search(r"\.\d+\.", f"{name}.") and "base_layer" not in name.split(".") and not is_below(name, others)
        if gated_ffn(module) is not None
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no gated FFN, down(act(gate(x)) * up(x)), outside of its mixture-of-experts "
            "blocks, whose copies could be experts. Use another kind of experts."
        )
    return found


def ffn_place(name: str, module: nn.Module, layers: list[MoeLayer], quantization: dict[str, Any]) -> Place:
    """Describe a gated FFN; arguments as in `block_place`.

    Raises:
        TypeError: The module is none, or has more to it than its equation.
    """
    base, ffn = base_of(module), gated_ffn(module)
    if ffn is None:
        raise TypeError(
            f"Target module {name} ({type(base).__name__}) is not supported: experts that are copies of an FFN need a "
            "gated one, down(act(gate(x)) * up(x)), with three linear layers, or two where one holds gate and up. "
            "Remove it from target_modules, or use another kind of experts."
        )
    in_features, inner_features, out_features = ffn.widths(base)
    return Place(name, in_features, out_features, kind=type(base).__name__, inner_features=inner_features)


def experts_names(model: nn.Module, layers: list[MoeLayer]) -> list[str]:
    """The experts modules of a model.

    Args:
        model: A transformers model.
        layers: Its sparse layers.

    Raises:
        ValueError: It has none that can be wrapped; the message says why.
    """
    if not layers:
        reason = unsupported_reason(model) or "it is a dense model"
        raise ValueError(
            f"{type(model).__name__} has no experts module that an adapter can follow: {reason}. Use an adapter with "
            "a router of its own, around blocks or linear layers."
        )
    return [layer.experts for layer in layers]


def block_place(name: str, module: nn.Module, layers: list[MoeLayer], quantization: dict[str, Any]) -> Place:
    """Describe a block.

    Args:
        name: Its full name.
        module: The block, or a tuner layer around it.
        layers: The model's sparse layers.
        quantization: What the quantization backend needs to know of the model.

    Raises:
        TypeError: Its width cannot be told, or it changes the width.
    """
    base = base_of(module)
    layer = next((layer for layer in layers if name in (layer.block, layer.experts)), None)
    if layer is not None and name == layer.experts:
        return Place(name, layer.in_features, layer.out_features, kind=type(base).__name__)
    routes = layer is not None or not {"router", "experts"}.isdisjoint(dict(base.named_children()))
    features = block_width(base) if routes else mlp_features(base)
    if features is None:
        raise TypeError(
            f"Target module {name} ({type(base).__name__}) is not supported: a block maps hidden states to hidden "
            "states of the same width, as an MLP or a mixture-of-experts block does. Remove it from target_modules."
        )
    return Place(name, features, features, kind=type(base).__name__)


def experts_place(name: str, module: nn.Module, layers: list[MoeLayer], quantization: dict[str, Any]) -> Place:
    """Describe an experts module; arguments as in `block_place`.

    Raises:
        TypeError: The module is none.
        ValueError: It holds the experts of one process only, whose indices are its own.
    """
    base = base_of(module)
    if has_local_indices(base):
        raise ValueError(
            f"The experts of {name} are split over processes (expert parallelism) by a release of transformers that "
            "calls them with local indices, so an adapter cannot follow them. Update transformers, load the model "
            "without expert parallelism, or use an adapter with a router of its own, around blocks or linear layers."
        )
    for layer in layers:
        if name == layer.experts:
            return Place(
                name,
                layer.in_features,
                layer.out_features,
                kind=type(base).__name__,
                num_experts=layer.num_experts,
                layer_index=layer.index,
                base=base,
            )
    names = [layer.experts for layer in layers]
    raise TypeError(
        f"Target module {name} ({type(base).__name__}) is no experts module of the backbone; those are {names}. Leave "
        "target_modules None to take them all."
    )


def mlp_features(module: nn.Module) -> int | None:
    """Width of the hidden states that an MLP reads and writes; None where that is not one width.

    Args:
        module: A module with linear layers of its own, the first of which reads its input and the last writes its
            output.
    """
    children = [base_of(child) for child in module.children()]
    widths = [_linear_widths(child) for child in children]
    linears = [width for width in widths if width is not None]
    if len(linears) < 2 or linears[0][0] != linears[-1][1]:
        return None
    return linears[0][0]


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module of linear layers is an MLP, and not a mixer of tokens, as those with a convolution are."""
    mixes = any(isinstance(child, nn.Conv1d) for child in module.children())
    return not mixes and mlp_features(module) is not None


def _linear_widths(module: nn.Module) -> tuple[int, int] | None:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return cast(tuple[int, int], (module.in_features, module.out_features))
    if hasattr(module, "nf"):  # transformers' Conv1D
        return cast(tuple[int, int], (module.nx, module.nf))
    return None
