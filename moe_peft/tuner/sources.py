"""Where an adapter is loaded from: a folder of this machine or a name on the Hub, the same files either way."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftType

from ..config.adapter_files import (
    COMPRESSED,
    CONFIG,
    WEIGHTS,
    AdapterFile,
    check_finite,
    find_weights,
    read_header,
    read_json_object,
    refuse_compressed,
)
from ..config.config import MoeConfig
from ..config.stamp import saved_meaning
from ..messages import shown
from .tensors import PEFT_PREFIX

# Configuration classes of routed adapters by peft's name of the type, as `registration.register` enters them.
ROUTED: dict[str, type[MoeConfig]] = {}
DOWNLOAD_OPTIONS = frozenset(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename"}


def download_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those among keyword arguments that say where and how to download.

    Args:
        options: Keyword arguments of a loading function.
    """
    return {name: value for name, value in options.items() if name in DOWNLOAD_OPTIONS}


def routed_config_class(source: str, options: Mapping[str, Any]) -> type[MoeConfig] | None:
    """Configuration class of a saved adapter, where it is a routed one.

    Args:
        source: Adapter folder, or a name on the Hub.
        options: What `download_options` returns.

    Returns:
        The class; None for other adapters, and where there is no configuration, which the caller reports.

    Raises:
        ValueError: The configuration cannot be read, or says no type that is known here.
    """
    path = Path(source, options.get("subfolder") or "", CONFIG)
    if not path.is_file():
        try:
            path = Path(hf_hub_download(source, CONFIG, **options))
        except Exception:
            return None  # peft looks for it in the same way, and says what is wrong
    found = read_json_object(path).get("peft_type")
    if not isinstance(found, str) or found not in {member.value for member in PeftType}:
        raise ValueError(
            f"{path} has peft_type={shown(found)}, which is no adapter type that peft or peft-moe knows. If a newer "
            "version saved it, upgrade; else save the adapter again."
        )
    if found not in ROUTED:
        _refuse_routed_weights(path, found)
    return ROUTED.get(found)


def _refuse_routed_weights(config: Path, peft_type: str) -> None:
    """Refuse weights that say they are a routed adapter's under the configuration of another type."""
    weights = config.parent / WEIGHTS
    try:
        meaning = saved_meaning(read_header(weights)) if weights.is_file() else None
    except ValueError:
        return  # of another package, which says what is wrong with them
    if meaning is not None:
        raise ValueError(
            f"{config} has peft_type={shown(peft_type)}, but {weights.name} beside it holds weights of "
            f"adapter_type={shown(meaning.get('adapter_type'))}. Put back the adapter_config.json that was saved "
            "with them. Nothing has been changed."
        )


def open_weights(source: str, options: Mapping[str, Any], key_mapping: Mapping[str, str] | None = None) -> AdapterFile:
    """Find an adapter's weights and check what needs no model.

    Args:
        source: Adapter folder, or a name on the Hub.
        options: What `download_options` returns.
        key_mapping: Pattern -> replacement in the keys, as peft applies it.

    Returns:
        Header of the file.

    Raises:
        ValueError: There are none in the safe format, they cannot be read, or hold values that are not finite.
    """
    path = find_weights(source, options.get("subfolder"))
    if path is None:
        try:
            path = Path(hf_hub_download(source, WEIGHTS, **options))
        except EntryNotFoundError as error:
            _refuse_compressed_name(source, options)
            raise ValueError(
                f"{source} has no {WEIGHTS} ({shown(str(error))}), and only safetensors are loaded: a pickle "
                "(adapter_model.bin) can run code when it is read. Save and push the adapter again."
            ) from error
    header = read_header(path)
    check_finite(path)
    if not key_mapping:
        return header
    shapes = {_renamed(key, key_mapping): shape for key, shape in header.shapes.items()}
    return dataclasses.replace(
        header, shapes=shapes, integers=frozenset(_renamed(key, key_mapping) for key in header.integers)
    )


def _refuse_compressed_name(source: str, options: Mapping[str, Any]) -> None:
    """Refuse a name on the Hub under which a compressed adapter lies; decompressing finds what is fetched here."""
    try:
        hf_hub_download(source, COMPRESSED, **options)
    except (OSError, EntryNotFoundError):
        return
    refuse_compressed(source)


def _renamed(key: str, mapping: Mapping[str, str]) -> str:
    """A key after the first replacement that fits, below peft's own prefix."""
    inner = key.removeprefix(PEFT_PREFIX)
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, inner)
        if count:
            return f"{PEFT_PREFIX}{new}"
    return key


def meaning_beside(source: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the adapter_config.json of a folder says that its weights mean; None where there is none of a routed type.

    Args:
        source: Adapter folder, or a name on the Hub.
        options: What `download_options` returns.

    Raises:
        ValueError: It cannot be read, or holds values that no adapter can have.
    """
    cls = routed_config_class(source, options)
    return None if cls is None else cls.from_pretrained(source, **options).meaning()
