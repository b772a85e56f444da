"""Names that an adapter may have: by them peft tells its weights, its modules and its folder from others."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import nn

from ..messages import shown

# Of the base model in a batch of several adapters.
BASE = "__base__"
# What peft puts around names of weights, its own modules beside a tuner's included.
WRAPPERS = frozenset({"base_model", "model", "base_layer", "modules_to_save", "original_module", "token_adapter"})
# A name of more bytes cannot be that of a folder, into which the adapter is saved.
MAX_BYTES = 200


def check_form(name: object) -> None:
    """Refuse what cannot be the name of any adapter.

    Args:
        name: What was given as the name.

    Raises:
        TypeError: It is no string.
        ValueError: It is empty, has characters of a path, or is the name of something else.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"adapter_name={shown(name)} must be a string, such as 'default': it becomes a part of the names of the "
            "adapter's weights."
        )
    reason = _fault(name)
    if reason is not None:
        raise ValueError(
            f"adapter_name={shown(name)} {reason}. Take another name, such as 'default' or 'adapter_1'. Nothing has "
            "been changed."
        )


def _fault(name: str) -> str | None:
    if not name or name != name.strip():
        return "is empty, or begins or ends with a space"
    if "." in name:
        return "has a dot, which separates the parts of the names of weights"
    if not name.isprintable() or any(mark in name for mark in (os.sep, "/", "\\")):
        return "has a character that cannot be in the name of the folder that the adapter is saved to"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return f"has more than {MAX_BYTES} bytes, too many for the name of a folder"
    if name == BASE:
        return "stands for the base model in a batch of several adapters (adapter_names)"
    if hasattr(nn.ModuleDict(), name):
        return "is an attribute of torch.nn.ModuleDict, which holds the adapters by name"
    return None


def check_parts(name: str, keys: Iterable[str], others: Iterable[str] = ()) -> None:
    """Refuse adapter names that the names of weights contain, as peft saves and loads by that part of them.

    Args:
        name: The new adapter's name.
        keys: Names of the weights that it will have, without its own name.
        others: Names of the adapters that are there.

    Raises:
        ValueError: One of the names is such a part.
    """
    places: dict[str, str] = dict.fromkeys(WRAPPERS, "any place")
    for key in keys:
        place = key.rpartition(".")[0].rpartition(".")[0]
        for part in key.split("."):
            places.setdefault(part, place)
    if name in places:
        raise ValueError(
            f"adapter_name={shown(name)} is a part of the names of the weights at {places[name]}, by which peft tells "
            f"adapters apart, so that saving would lose weights. Take another name, as {shown('adapter_' + name)}."
        )
    taken = next((other for other in others if other in places), None)
    if taken is not None:
        raise ValueError(
            f"The adapter {shown(taken)}, which the model has, is called like a part of the names of the weights at "
            f"{places[taken]}, so that saving {shown(name)} would lose them. Save that adapter and load it under "
            f"another name, as {shown('adapter_' + taken)}."
        )
