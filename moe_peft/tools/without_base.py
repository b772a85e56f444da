"""A saved adapter with its own tensors in memory and its base model's shapes alone, for tools that need no forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from ..backbone.without_weights import meta_model
from ..config.adapter_files import WEIGHTS, read_header
from ..config.stamp import saved_embeddings
from ..messages import shown
from ..tuner.tensors import PEFT_PREFIX, TOKENS, named_tensors
from .health import inspect_adapter, read_config


def load_without_base(folder: str | Path, base: str | Path | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load an adapter on its base model's configuration: the base's weights stay on the meta device.

    Args:
        folder: Folder of a saved adapter.
        base: The base model's folder, or its name on the Hub; None takes the one that the adapter names.
        trust_remote_code: Whether code of the checkpoint may run.

    Returns:
        A `PeftModel` in evaluation mode, whose only adapter is "default".

    Raises:
        ValueError: The adapter is broken or not of this package, no base model is known, or they do not go together.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    inspect_adapter(folder)
    config = read_config(folder)
    name = str(base) if base is not None else config.base_model_name_or_path
    if not name:
        raise ValueError(f"{folder} names no base model. Say which one it was trained on.")
    tensors = load_file(folder / WEIGHTS)
    resized = saved_embeddings(read_header(folder / WEIGHTS))
    if resized:
        raise ValueError(
            f"{folder} holds embeddings of a vocabulary of its own ({shown(min(resized))}), which the base model's "
            "files have no place for. Load base and adapter in memory, resize the embeddings, and call "
            "model.merge_and_unload().save_pretrained(folder)."
        )
    try:
        base_config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The base model {shown(name)} has no configuration that can be read ({reason}).") from error
    shapes = meta_model(base_config, config.task_type, trust_remote_code)
    model = PeftModel.from_pretrained(shapes, str(folder), low_cpu_mem_usage=True)
    _assign(model, tensors, f"{config.adapter_type.lower()}_")
    return model.eval()


def _assign(model: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Give an adapter its values again: loading ends with moving it to where its base is, which holds none."""
    plain = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    names = {name: own.key for name, own in named_tensors(model, prefix, "default").items()}
    own = {name: plain[key] for name, key in names.items()}
    for key, tensor in plain.items():
        if key.endswith(TOKENS):
            own[f"{PEFT_PREFIX}{key}.default"] = tensor
    model.load_state_dict(own, strict=False, assign=True)
