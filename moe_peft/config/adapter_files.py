"""Checks of an adapter's files that need no model: complete safetensors of finite numbers, and a readable JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from ..messages import shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
# Weights in a form that is made for the way alone.
COMPRESSED = "adapter_compressed.safetensors"
# How safetensors' names of types without a fraction begin.
FLOATS = ("F", "BF")


@dataclass(frozen=True)
class AdapterFile:
    """What the header of a safetensors file says; its tensors are not read.

    Attributes:
        name: Path of the file, or what else the tensors come from, for messages.
        shapes: Shape of each tensor by its key.
        integers: Keys of tensors that hold no floating point numbers.
        metadata: Strings by name, as they were written with the tensors.
        path: The file; None for tensors in memory.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    integers: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None


def read_header(path: str | Path) -> AdapterFile:
    """Read the header of a safetensors file.

    Args:
        path: The file.

    Raises:
        ValueError: It is truncated, damaged, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(own.get_shape()) for key, own in slices.items()}
            integers = frozenset(key for key, own in slices.items() if not own.get_dtype().startswith(FLOATS))
            return AdapterFile(str(path), shapes, integers, file.metadata() or {}, Path(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): the file is truncated or damaged. Copy or download "
            "it again; the base model has not been touched."
        ) from error


def header_of(tensors: Mapping[str, torch.Tensor]) -> AdapterFile:
    """The same for tensors in memory.

    Args:
        tensors: By their keys.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    integers = frozenset(key for key, tensor in tensors.items() if not tensor.is_floating_point())
    return AdapterFile("The given state dict", shapes, integers)


def check_finite(path: str | Path) -> None:
    """Refuse a file with values that are not finite.

    Args:
        path: A safetensors file, of which one tensor at a time is read.

    Raises:
        ValueError: A tensor holds NaN or an infinity; all that do are named.
    """
    with safe_open(path, framework="pt") as file:
        broken = [key for key in file.keys() if not is_finite(file.get_tensor(key))]  # noqa: SIM118
    if broken:
        raise ValueError(
            f"{path} holds NaN or infinite values in {len(broken)} tensors: {shown(broken)}. The run that saved it "
            "had diverged, or the file is damaged: take an earlier checkpoint. Nothing has been changed."
        )


def check_values(name: str, tensors: Mapping[str, Any], own: Collection[str]) -> None:
    """Refuse tensors in memory whose values no adapter can have, as those of files are.

    Args:
        name: What the tensors come from, for messages.
        tensors: By their keys; of split ones each process looks at its own part.
        own: Keys of the adapter's own tensors; a module that is saved with it may hold integers.

    Raises:
        TypeError: One is no tensor.
        ValueError: Tensors have no values, hold integers, or NaN or infinite values; all that do are named.
    """
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} holds {shown(tensor)} under {key}, which is no tensor. Nothing has been changed.")
    wrong = {
        "no values (they are on the meta device)": [key for key, tensor in tensors.items() if tensor.is_meta],
        "integers or complex numbers": [key for key in own if not tensors[key].is_floating_point()],
        "NaN or infinite values": [k for k, tensor in tensors.items() if not tensor.is_meta and not is_finite(tensor)],
    }
    for what, keys in wrong.items():
        if keys:
            raise ValueError(
                f"{name} holds {what} in {len(keys)} tensors: {shown(sorted(keys))}, where an adapter has finite "
                "floating point numbers. Take them from an adapter that was saved whole, from an earlier checkpoint. "
                "Nothing has been changed."
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values of a tensor are, of this process's part where it is split."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.is_floating_point():
        return True
    return bool(torch.isfinite(local.float() if local.element_size() == 1 else local).all())


def find_weights(folder: str | Path, subfolder: str | None = None) -> Path | None:
    """The weights in a local adapter folder.

    Args:
        folder: Adapter folder, or a name on the Hub.
        subfolder: Folder inside it, if any.

    Returns:
        Path of the safetensors file; None where `folder` is none of this machine.

    Raises:
        ValueError: The folder holds no safetensors file.
    """
    path = Path(folder) / subfolder if subfolder else Path(folder)
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if (path / PICKLED_WEIGHTS).is_file():
        refuse_pickle(str(path / PICKLED_WEIGHTS))
    if (path / COMPRESSED).is_file():
        refuse_compressed(path)
    if (path / CONFIG).is_file():
        raise ValueError(
            f"{path} holds no {WEIGHTS}, so there are no weights to load. Name the folder that model.save_pretrained "
            "or trainer.save_model wrote."
        )
    return None


def refuse_pickle(name: str) -> None:
    """Refuse weights that are no safetensors.

    Args:
        name: Path or name of the file.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{name} is a pickle, which can run code when it is read; only safetensors are loaded. Save the adapter again "
        "with model.save_pretrained(folder), or convert the file with safetensors.torch.save_file."
    )


def refuse_compressed(source: str | Path) -> None:
    """Refuse weights that are compressed.

    Args:
        source: Their folder, or their name on the Hub.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{source} holds a compressed adapter ({COMPRESSED}), which loads once it is decompressed: "
        f"moe-peft decompress {source} --output ADAPTER, or moe_peft.tools.decompress_adapter(folder, output)."
    )


def check_adapter_files(folder: str, subfolder: str | None, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check the weights in a local folder; a name on the Hub is left to the loading of its weights.

    Args:
        folder: Adapter folder or name on the Hub.
        subfolder: Folder inside it, if any.
        expected: How shapes must begin, by the end of the tensors' names.

    Raises:
        ValueError: The weights are pickled, cannot be read, or have other experts than the configuration says.
    """
    path = Path(folder) / subfolder if subfolder else Path(folder)
    if not (path / WEIGHTS).is_file():
        if (path / PICKLED_WEIGHTS).is_file():
            refuse_pickle(str(path / PICKLED_WEIGHTS))
        if (path / COMPRESSED).is_file():
            refuse_compressed(path)
        return
    for key, shape in read_header(path / WEIGHTS).shapes.items():
        for ending, begin in expected.items():
            if key.endswith(ending) and shape[: len(begin)] != begin:
                raise ValueError(
                    f"{path / WEIGHTS} holds {key} of shape {shape}, but by its {CONFIG} (num_experts, r) it must "
                    f"begin with {begin}. The two files do not belong together: copy both from the same save."
                )


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.

    Raises:
        ValueError: It is no JSON, no UTF-8, nested too deeply, or holds something else than an object.
    """
    try:
        found = json.loads(Path(path).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({shown(str(error))}). Copy or download it again, or save the adapter again."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds {shown(found)}, not a JSON object with an adapter's fields. Save the adapter again."
        )
    return found


def num_parameters(folder: str | Path) -> int | None:
    """Number of weights in a folder's safetensors file, read from its header; None when it has no such file.

    Args:
        folder: Adapter folder.

    Raises:
        ValueError: The file is truncated or damaged.
    """
    weights = Path(folder) / WEIGHTS
    return sum(math.prod(shape) for shape in read_header(weights).shapes.values()) if weights.is_file() else None
