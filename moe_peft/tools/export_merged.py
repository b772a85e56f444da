"""An adapter merged into its base model's checkpoint, tensor by tensor: no model is built, and none is in memory.

The output is the base's folder with the merged tensors in the place of the old ones: names, shards, index, tokenizer
and generation settings stay. At most one fused tensor of one layer is in memory at a time, with its parts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig

from ..backbone.without_weights import meta_model
from ..files import check_free, new_folder, write_text
from ..hub.push import BESIDE
from ..messages import shown
from .checkpoint import Checkpoint, overwriting
from .checkpoint_layout import CheckpointLayout, Group
from .checks import check_peft_model
from .merge_for_task import decided
from .weight_changes import IN_MEMORY, Changes, weight_changes

# Weights in other forms than safetensors, which would be the base's beside the merged ones.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".safetensors")
OTHER_INDICES = (".bin.index.json", ".safetensors.index.json")
FOLDERS = ("additional_chat_templates",)
CARD = "README.md"


def export_merged(
    model: PeftModel,
    base_folder: str | Path,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    task: int | None = None,
    tokenizer: str | Path | None = None,
) -> None:
    """Write the checkpoint of the base model with an adapter merged into it.

    Args:
        model: A model with the adapter, which is not changed; its base weights are not read, and may be on the meta
            device.
        base_folder: The base model's folder, with safetensors.
        folder: The folder to make.
        adapter_name: Which adapter.
        task: Task that is merged, of an adapter whose router reads the task alone.
        tokenizer: Folder whose tokenizer takes the place of the base's, such as the adapter's.

    Raises:
        TypeError: The model is no `PeftModel`.
        ValueError: The adapter depends on its input, the checkpoint is quantized, not of this model or not in
            safetensors, or there are files at `folder`; nothing has been written.
    """
    check_peft_model(model, "export_merged")
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"export_merged: the model has no adapter {shown(adapter_name)}; it has "
            f"{shown(sorted(model.peft_config))}."
        )
    base_folder = Path(base_folder)
    check_free(folder)
    checkpoint = Checkpoint(base_folder)
    config = AutoConfig.from_pretrained(str(base_folder))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{base_folder} is a quantized checkpoint, into which nothing can be merged exactly. Name the model's "
            "checkpoint in 16 or 32 bit; the adapter fits it as well."
        )
    layout = CheckpointLayout(meta_model(config, model.peft_config[adapter_name].task_type), checkpoint.tensors)
    with decided(model, adapter_name, task):
        changes = weight_changes(model, adapter_name)
        groups = _groups(layout, changes)
        with new_folder(folder) as growing:
            _copy(checkpoint, growing)
            for path in [] if tokenizer is None else tokenizer_files(Path(tokenizer)):
                shutil.copyfile(path, growing / path.name)
            with overwriting(checkpoint, growing) as files:
                for group in groups:
                    for name, tensor in _merged(layout, group, changes, checkpoint):
                        files.write(name, tensor)
            write_text(growing / CARD, _card(model, adapter_name, base_folder))


def _groups(layout: CheckpointLayout, changes: Changes) -> list[Group]:
    """The parts of a checkpoint that change, each once."""
    lost = next((name for name in changes if name not in layout.groups), None)
    if lost is not None:
        raise ValueError(
            f"The checkpoint has no tensor for {shown(lost)}, which the adapter changes: it is of another model, or "
            f"shares that weight with another module. {IN_MEMORY}"
        )
    return list({layout.groups[name].name: layout.groups[name] for name in changes}.values())


@torch.no_grad()
def _merged(
    layout: CheckpointLayout, group: Group, changes: Changes, checkpoint: Checkpoint
) -> Iterator[tuple[str, torch.Tensor]]:
    """A group's tensors as they are stored, with the changes."""
    parameters = layout.read(group, checkpoint.read)
    for name, change in changes.items():
        if name in parameters:
            parameters[name] = change(parameters[name])
            if not bool(torch.isfinite(parameters[name]).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights, at {name}. The adapter or the checkpoint is broken, "
                    "or its dtype is too small for what the adapter adds."
                )
    yield from layout.written(group, parameters).items()


def _copy(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the shards, and what else a checkpoint's folder holds but for weights in further forms."""
    for path in sorted(checkpoint.folder.iterdir()):
        own = path.name in checkpoint.files or path.name == "model.safetensors.index.json"
        other = path.name.endswith((*OTHER_WEIGHTS, *OTHER_INDICES)) and not own
        if path.is_file() and not other and path.name != CARD and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name in FOLDERS:
            shutil.copytree(path, folder / path.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """A tokenizer's and a processor's files of a folder, with the picture that its card shows.

    Args:
        folder: Of an adapter or a model.
    """
    return [path for pattern in BESIDE if "/" not in pattern for path in folder.glob(pattern) if path.is_file()]


def _card(model: PeftModel, adapter_name: str, base_folder: Path) -> str:
    config: Any = model.peft_config[adapter_name]
    base = config.base_model_name_or_path or base_folder.name
    metadata = f"---\nlibrary_name: transformers\nbase_model: {json.dumps(base)}\ntags: [moe-peft, merged]\n---\n"
    return (
        f"{metadata}\n# {base}, with an adapter merged into it\n\n"
        f"The adapter ({config.method}: {config.summary()}) is a part of the weights: the model loads with "
        "`transformers` alone.\n"
    )
