"""Saving an adapter: all of its tensors, under names without wrappers, with their meaning in the same file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from ..backbone.partitioned import is_partitioned
from ..config.adapter_files import CONFIG, read_header, read_json_object
from ..config.config import MoeConfig
from ..config.stamp import stamp
from ..messages import shown
from .tensors import (
    PEFT_PREFIX,
    TOKENS,
    OwnTensor,
    base_key,
    further_tensors,
    named_tensors,
    plain_name,
    present_tensors,
)


def prefix_of(config: MoeConfig) -> str:
    """What the attributes of an adapter type begin with.

    Args:
        config: A configuration of the type.
    """
    return f"{config.adapter_type.lower()}_"


def unwrapped(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under names without wrappers.

    Args:
        state_dict: Of a model, or of one inside a data-parallel wrapper.
    """
    whole = "module." if state_dict and all(key.startswith("module.") for key in state_dict) else ""
    return {plain_name(key.removeprefix(whole)): tensor for key, tensor in state_dict.items()}


def check_whole(model: Any, adapter_name: str, state_dict: Mapping[str, torch.Tensor] | None) -> None:
    """Refuse to save tensors of which this process holds a part.

    Args:
        model: The `PeftModel`.
        adapter_name: The adapter that is saved.
        state_dict: Tensors that were gathered for saving; None for the model's own.

    Raises:
        ValueError: The model's tensors are split, and none were gathered, or they have no name in a file; nothing has
            been written.
    """
    prefix = prefix_of(model.peft_config[adapter_name])
    tensors = named_tensors(model, prefix, adapter_name)
    _refuse_below(tensors, prefix)
    if state_dict is not None:
        return
    gathered = {name for name, own in tensors.items() if own.split is not None}  # by every process that saves
    for name, tensor in model.named_parameters():
        split = (isinstance(tensor, DTensor) or is_partitioned(tensor)) and plain_name(name) not in gathered
        if f".{adapter_name}." in name and split:
            raise ValueError(
                f"{name} is split over processes, and saving it here would lose the other parts. Call "
                "trainer.save_model(folder), or in a loop model.save_pretrained(folder, "
                "state_dict=accelerator.get_state_dict(model), is_main_process=accelerator.is_main_process) in every "
                "process. Nothing has been written."
            )


def own_tensors(
    model: nn.Module, config: MoeConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Select an adapter's tensors, all of them.

    Args:
        model: The model.
        config: The adapter's configuration.
        adapter_name: Its name.
        state_dict: Tensors by the model's names without wrappers.

    Raises:
        ValueError: A tensor is missing, or a part of it; nothing has been written.
    """
    wanted = named_tensors(model, prefix_of(config), adapter_name)
    _refuse_below(wanted, prefix_of(config))
    found = {
        name: state_dict[name] if own.split is None else own.split.whole(state_dict[name])
        for name, own in wanted.items()
        if name in state_dict
    }
    if not found and distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return found  # the tensors were gathered in the first process, which alone writes
    wrong = sorted(name for name, own in wanted.items() if name not in found or tuple(found[name].shape) != own.shape)
    if wrong:
        raise ValueError(
            f"Saving the adapter {shown(adapter_name)} would lose {len(wrong)} of its {len(wanted)} tensors, the "
            f"first is {wrong[0]}: the state dict that was given or gathered does not hold them whole. Pass "
            "state_dict=accelerator.get_state_dict(model) of the model as the trainer has prepared it. Nothing has "
            "been written."
        )
    return found


def _refuse_below(wanted: Mapping[str, OwnTensor], prefix: str) -> None:
    """Refuse tensors in modules below a part, as a parametrization leaves them, which no file has names for."""
    below = sorted(name for name, own in wanted.items() if own.key.rpartition(f".{prefix}")[2].count(".") > 1)
    if below:
        raise ValueError(
            f"{below[0]} (and {len(below) - 1} more) lies in a module below a part of it, as parametrizations "
            "put it, and a file has no name for it. Take parametrizations off with torch.nn.utils.parametrize."
            "remove_parametrizations(part, name) before saving. Nothing has been written."
        )


def prepare_saving(config: MoeConfig, folder: Path) -> None:
    """Write the configuration first where the folder holds an adapter of another meaning.

    peft writes the weights first: an interruption would leave them beside a configuration that misreads them.

    Args:
        config: The adapter's configuration.
        folder: Where it will be saved.
    """
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file() or not (folder / CONFIG).is_file():
        return
    try:
        same = type(config).from_peft_type(**read_json_object(folder / CONFIG)).meaning() == config.meaning()
    except (AttributeError, KeyError, TypeError, ValueError):
        same = False  # of another package, or unreadable
    if not same:
        training, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(str(folder))
        finally:
            config.inference_mode = training


def finish_saving(model: nn.Module, config: MoeConfig, adapter_name: str, folder: Path) -> None:
    """Check what was written, and add to it what gives the weights their meaning.

    Args:
        model: The model.
        config: The configuration of the adapter that was saved.
        adapter_name: Its name.
        folder: Its folder.

    Raises:
        ValueError: The file lacks a tensor of the adapter.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    wanted = present_tensors(model, prefix_of(config), adapter_name)
    further = further_tensors(model, config)
    keys = {key.removeprefix(PEFT_PREFIX): key for key in read_header(path).shapes}
    lost = sorted(wanted.keys() - keys.keys())
    if lost:
        raise ValueError(
            f"{path} lacks {len(lost)} of the {len(wanted)} tensors of the adapter {shown(adapter_name)}, the first "
            f"is {lost[0]}. Save the adapter again from a model that is not split or wrapped."
        )
    others = [
        key
        for inner, key in keys.items()
        if inner not in wanted and base_key(inner) not in further and not inner.endswith(TOKENS)
    ]
    stamp(path, config.meaning(), embeddings=others)
