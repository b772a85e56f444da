"""Writes into a file of weights what gives them their meaning, and compares it with a configuration on loading.

The tensors of an adapter say neither which experts of the backbone they belong to, nor how they are scaled, chosen or
activated. `adapter_config.json` does, but may be edited, swapped, or not be read at all where an adapter of that name
exists. So the metadata of the safetensors file repeats it, which travels with the tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from ..messages import shown
from .adapter_files import AdapterFile

MEANING = "moe_peft"
# Names of the base model's own tensors in the file: embeddings that were resized, which peft saves beside an adapter.
EMBEDDINGS = "moe_peft_embeddings"
HEADER_BYTES = 8
ALIGNMENT = 8
# Fields that a message lists.
SHOWN = 6


def stamp(path: str | Path, meaning: Mapping[str, Any], embeddings: Iterable[str] = ()) -> None:
    """Write into a safetensors file what gives its tensors their meaning, in one step.

    Args:
        path: The file; its tensors stay as they are.
        meaning: What `MoeConfig.meaning` returns.
        embeddings: Keys of tensors of the base model in the file.
    """
    entries = {MEANING: json.dumps(meaning, sort_keys=True)}
    names = sorted(embeddings)
    if names:
        entries[EMBEDDINGS] = json.dumps(names)
    with open(path, "rb") as old:
        length = int.from_bytes(old.read(HEADER_BYTES), "little")
        header = json.loads(old.read(length))
        header["__metadata__"] = {**header.get("__metadata__", {}), **entries}
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % ALIGNMENT)
        with replacing(path) as new:
            new.write(len(text).to_bytes(HEADER_BYTES, "little") + text)
            shutil.copyfileobj(old, new, 1 << 20)


def saved_meaning(file: AdapterFile) -> dict[str, Any] | None:
    """What a file says of its tensors; None for a file that says nothing, as of version 0.1.0.

    Args:
        file: Its header.

    Raises:
        ValueError: It says it in a form that cannot be read.
    """
    if MEANING not in file.metadata:
        return None
    try:
        found = json.loads(file.metadata[MEANING])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"The metadata {shown(MEANING)} of {file.name} cannot be read: {shown(file.metadata[MEANING])}. The file "
            "is damaged; copy or download it again. Nothing has been changed."
        )
    return found


def saved_embeddings(file: AdapterFile) -> frozenset[str]:
    """Keys of the base model's tensors that a file says it was saved with.

    Args:
        file: Its header.
    """
    try:
        found = json.loads(file.metadata.get(EMBEDDINGS, "[]"))
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(name for name in found if isinstance(name, str)) if isinstance(found, list) else frozenset()


def check_meaning(name: str, saved: Mapping[str, Any], own: Mapping[str, Any], whose: str) -> None:
    """Refuse weights that mean something else than a configuration would take them for.

    Args:
        name: Where the weights come from, for the message.
        saved: What they were saved with.
        own: What the configuration says.
        whose: Whose configuration it is, for the message.

    Raises:
        ValueError: A field differs; both values are named.
    """
    unknown = sorted(saved.keys() - own.keys())
    if unknown and saved.get("adapter_type") == own.get("adapter_type"):
        raise ValueError(
            f"{name} was saved with {_listed(saved, unknown)}, which this version of peft-moe does not know. Upgrade "
            "peft-moe. Nothing has been changed."
        )
    # A field that came later is not in the file; its default is what the older version computed.
    differing = sorted(field for field in saved.keys() & own.keys() if saved[field] != own[field])
    if differing:
        its = _listed(saved, differing)
        raise ValueError(
            f"{name} holds weights of {its}, but {whose} has {_listed(own, differing)}, with which they would compute "
            f"something else. Set {its}, or load them under a name of their own, with the adapter_config.json that "
            "was saved with them. Nothing has been changed."
        )


def _listed(values: Mapping[str, Any], names: Sequence[str]) -> str:
    shown_names = ", ".join(f"{name}={shown(values[name])}" for name in names[:SHOWN])
    return shown_names if len(names) <= SHOWN else f"{shown_names} and {len(names) - SHOWN} more"
