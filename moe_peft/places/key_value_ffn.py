"""Places of mixtures of vectors: keys and values, the FFN's intermediate, and how wide a key or value head is.

They are those of (IA)3 (Liu et al., 2022, arXiv 2205.05638): l_k * keys, l_v * values, l_ff * intermediate.
"""

from __future__ import annotations

import re

from torch import nn

from ..backbone.attention import attention_names
from ..backbone.encoders import encoder_names
from ..backbone.structure import is_below
from .linear import linear_features, linear_names, text_linear_names

KEY_VALUE_NAMES = ("k_proj", "v_proj", "k", "v", "key", "value", "key_proj", "value_proj", "k_lin", "v_lin")
# Projections that hold queries, keys and values (or keys and values) in one matrix.
FUSED_NAMES = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "in_proj", "kv_proj", "kv_b_proj")
# What attention modules call the width of one head; values may have one of their own.
HEAD_WIDTHS = ("head_dim", "key_value_proj_dim", "attention_head_size")
VALUE_HEAD_WIDTHS = ("v_head_dim", *HEAD_WIDTHS)


def key_value_names(model: nn.Module) -> list[str]:
    """Key and value projections of a language model, or the fused ones where there are no others, as in peft's (IA)3.

    Args:
        model: A transformers model.

    Raises:
        ValueError: It has neither.
    """
    linears, attention = text_linear_names(model), attention_names(model)
    inside = [name for name in linears if is_below(name, attention)]
    for wanted in (KEY_VALUE_NAMES, FUSED_NAMES):
        names = [name for name in inside if _leaf(name) in wanted]
        if names:
            return names
    raise ValueError(
        f"{type(model).__name__} has no key and value projections. Please specify `target_modules`; its linear "
        f"layers are called {sorted({_leaf(name) for name in linears})}."
    )


def ffn_output_names(model: nn.Module) -> list[str]:
    """The last layers of a model's FFNs, which read the intermediate.

    An FFN is a group of linear layers outside attention that leads back to the width it starts from; in BERT each of
    them has a module of its own. Bottlenecks, and mixers with a convolution, are none.

    Args:
        model: Any model.
    """
    modules, attention = dict(model.named_modules()), attention_names(model)
    siblings: dict[str, list[str]] = {}
    for name in linear_names(model):
        if re.search(r"\.\d+\.", name) and not is_below(name, attention):
            siblings.setdefault(name.rpartition(".")[0], []).append(name)
    groups: dict[str, list[str]] = {}
    for parent, names in siblings.items():
        if not any(isinstance(child, nn.Conv1d) for child in modules[parent].children()):
            alone = f"{parent.rpartition('.')[0]}.*"
            groups.setdefault(parent if len(names) > 1 else alone, []).extend(names)
    return [names[-1] for names in groups.values() if _is_ffn([linear_features(modules[name]) for name in names])]


def _is_ffn(shapes: list[tuple[int, int] | None]) -> bool:
    first, last = shapes[0], shapes[-1]
    if first is None or last is None or len(shapes) == 1 or first[0] != last[1]:
        return False
    gate_beside_up = first[1] == 2 * last[0]
    return gate_beside_up or (first[1] == last[0] and (len(shapes) > 2 or last[0] >= last[1]))


def head_widths(model: nn.Module, head_dim: int | None = None) -> dict[str, int]:
    """Width of a head at each key or value projection, by its name; fused projections have no single one.

    Attention modules say it themselves: configurations may hold another number, as that of rotary embeddings.

    Args:
        model: Any model.
        head_dim: The width, where the attention modules of the language model are not to be asked.

    Raises:
        ValueError: Heads of `head_dim` do not fill a projection.
    """
    modules, widths = dict(model.named_modules()), {}
    encoders, attention = encoder_names(model), attention_names(model)
    for name, module in modules.items():
        features = linear_features(module)
        if features is None or _leaf(name) not in KEY_VALUE_NAMES or not is_below(name, attention):
            continue
        given = None if is_below(name, encoders) else head_dim
        width = given or _own_width(modules[name.rpartition(".")[0]], _leaf(name))
        if width is not None and features[1] % width == 0:
            widths[name] = width
        elif given is not None:
            raise ValueError(
                f"head_dim={head_dim} does not divide the {features[1]} outputs of {name}. Leave head_dim None to ask "
                "the model's attention modules, or set router_granularity='token'."
            )
    return widths


def _own_width(attention: nn.Module, leaf: str) -> int | None:
    names = VALUE_HEAD_WIDTHS if leaf.startswith("v") else HEAD_WIDTHS
    found = [getattr(attention, name, None) for name in names]
    return next((width for width in found if isinstance(width, int) and width > 0), None)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
