"""Finds the attention of any model: a module called so, or one that owns projections of queries, keys and values."""

from __future__ import annotations

import re

from torch import nn

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# What projections of queries, keys and values are called, and ones that hold all three.
PROJECTION = re.compile(r"(?:to_?|w_?|c_?)?(q|k|v|query|key|value)(?:_?(?:proj|lin|linear|layer|project\w*))?", re.I)
FUSED_PROJECTION = re.compile(r"c_attn|w?_?qkv(?:_?(?:proj|lin|linear))?|query_key_value", re.I)


def attention_names(model: nn.Module) -> set[str]:
    """Names of the attention modules of a model.

    A module is one by its name, or where it projects queries, keys and values, whatever it is called, as `mixer`.

    Args:
        model: Any model, with or without adapters.

    Returns:
        Full module names; what lies below them belongs to the attention too.
    """
    names: set[str] = set()
    for name, module in model.named_modules():
        if ATTENTION.search(name.rpartition(".")[2]) or projects_queries_keys_values(module):
            names.add(name)
    return names


def projects_queries_keys_values(module: nn.Module) -> bool:
    """Whether a module owns projections of queries, keys and values, apart or in one matrix.

    Args:
        module: Any module; only the names of its children are looked at.
    """
    children = [name for name, _ in module.named_children()]
    kinds = {match.group(1)[0] for name in children if (match := PROJECTION.fullmatch(name))}
    return len(kinds) == 3 or any(FUSED_PROJECTION.fullmatch(name) for name in children)
