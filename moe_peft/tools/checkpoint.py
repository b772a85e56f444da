"""Checkpoints of safetensors shards whose tensors are read one by one, and overwritten in place.

A file is 8 bytes with the length of its header, the header (JSON: name -> dtype, shape, first and last byte), and the
tensors' bytes. A tensor of the same dtype and shape takes exactly the bytes of the old one, so that headers, index and
every other tensor stay as they are to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open

from ..messages import shown

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LENGTH_BYTES = 8
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        file: Name of its shard.
        dtype: As the header calls it.
        shape: Its shape.
        start: First byte in the shard.
        stop: The byte after its last.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of a model's folder, of which none is in memory.

    Args:
        folder: Folder of a checkpoint.

    Attributes:
        folder: The same.
        files: Names of its shards.
        tensors: Name of a tensor -> where it lies.

    Raises:
        ValueError: It holds no safetensors, lacks a shard, or a shard is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _shards(self.folder)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            self.tensors |= _read_shard(self.folder / file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read from its shard.

        Args:
            name: Its name in the checkpoint.
        """
        with safe_open(self.folder / self.tensors[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


@contextmanager
def overwriting(checkpoint: Checkpoint, folder: Path) -> Iterator[Overwriter]:
    """Change tensors of a copy of a checkpoint.

    Args:
        checkpoint: What was copied.
        folder: Folder of the copy, with the same shards.

    Yields:
        What takes the changed tensors.
    """
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "r+b")) for name in checkpoint.files}
        yield Overwriter(checkpoint.tensors, files)


class Overwriter:
    """Writes tensors over those of the same name.

    Args:
        tensors: Where each lies.
        files: The shards by name, open for writing.

    Attributes:
        written: Names of the tensors that were written.
    """

    def __init__(self, tensors: Mapping[str, Stored], files: Mapping[str, BinaryIO]) -> None:
        self.tensors, self.files = tensors, files
        self.written: set[str] = set()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in the place of the one that is there.

        Args:
            name: Its name in the checkpoint.
            tensor: Of the same dtype and shape.

        Raises:
            ValueError: The stored one is of a dtype without a fraction, or of another dtype or shape.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise ValueError(
                f"{name} is stored as {stored.dtype}, into which nothing can be merged. Merge into the model's "
                "checkpoint in 16 or 32 bit."
            )
        if DTYPES[stored.dtype] != tensor.dtype or stored.shape != tuple(tensor.shape):
            raise ValueError(
                f"{name} is stored as {stored.dtype} of shape {stored.shape}, and merging made it {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}. The checkpoint and the adapter's base model differ."
            )
        file = self.files[stored.file]
        file.seek(stored.start)
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        file.write(values.data)
        self.written.add(name)


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of shards. Copy or download the checkpoint again.") from error
        outside = [name for name in files if not isinstance(name, str) or Path(name).name != name]
        lost = [name for name in files if name not in outside and not (folder / name).is_file()]
        if outside or lost:
            raise ValueError(f"{index} names the shard {shown((outside + lost)[0])}, which {folder} does not hold.")
        return files
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise ValueError(
        f"{folder} holds neither {SINGLE} nor {INDEX}. Name the folder of a checkpoint in safetensors; one with "
        "pytorch_model.bin becomes such by loading it and calling save_pretrained."
    )


def _read_shard(path: Path) -> dict[str, Stored]:
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            size, first = path.stat().st_size, LENGTH_BYTES + length
            header = json.loads(file.read(length)) if first <= size else None
        assert header is not None
        found = {
            name: Stored(path.name, own["dtype"], tuple(own["shape"]), *(first + at for at in own["data_offsets"]))
            for name, own in header.items()
            if name != "__metadata__"
        }
        assert all(first <= own.start <= own.stop <= size for own in found.values())
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or damaged. Copy or download the checkpoint again.") from error
    return found
