"""Checks of an adapter's folder that need no model: a complete safetensors file with the shapes the fields promise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"


def check_adapter_files(folder: str, subfolder: str | None, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check the weights in a local folder; a name on the Hub is left to the download's own checks.

    Args:
        folder: Adapter folder or name on the Hub.
        subfolder: Folder inside it, if any.
        expected: How shapes must begin, by the end of the tensors' names.

    Raises:
        ValueError: The weights are pickled, cannot be read, or have other experts than the configuration says.
    """
    path = Path(folder) / subfolder if subfolder else Path(folder)
    weights = path / WEIGHTS
    if not weights.is_file():
        if (path / PICKLED_WEIGHTS).is_file():
            raise ValueError(
                f"{path / PICKLED_WEIGHTS} is a pickle, which can run code when it is read; only safetensors are "
                "loaded. Save the adapter again with model.save_pretrained(folder), or convert the file with "
                "safetensors.torch.save_file."
            )
        return
    for key, shape in _shapes(weights).items():
        for ending, begin in expected.items():
            if key.endswith(ending) and shape[: len(begin)] != begin:
                raise ValueError(
                    f"{weights} holds {key} of shape {shape}, but by its adapter_config.json (num_experts, r) it must "
                    f"begin with {begin}. The two files do not belong together: copy both from the same save."
                )


def num_parameters(folder: str | Path) -> int | None:
    """Number of weights in a folder's safetensors file, read from its header; None when it has no such file.

    Args:
        folder: Adapter folder.

    Raises:
        ValueError: The file is truncated or damaged.
    """
    weights = Path(folder) / WEIGHTS
    return sum(math.prod(shape) for shape in _shapes(weights).values()) if weights.is_file() else None


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(weights, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{weights} cannot be read as safetensors ({error}): the file is truncated or damaged. Copy or download "
            "it again; the base model has not been touched."
        ) from error
