"""Compares a checkpoint with the model that resumes from it, also where its weights are read past peft.

Under FSDP and DeepSpeed a trainer loads the states that their engines have saved, in which nothing says what the
tensors mean. So the adapter_config.json of the checkpoint is compared before anything is loaded; where the trainer
writes none, as with sharded states, it is written beside them. The values are looked at once they are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerState, TrainingArguments

from ..config.adapter_files import CONFIG, WEIGHTS, read_header
from ..config.config import MoeConfig
from ..config.stamp import check_meaning, saved_meaning
from ..layers import RoutedLayer
from ..messages import shown
from ..tuner.sources import meaning_beside

DEFAULT = "default"


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where a trainer writes the checkpoint of the step that it has reached.

    Args:
        args: The trainer's arguments.
        state: Its state.
    """
    return Path(args.output_dir or "") / f"checkpoint-{state.global_step}"


def check_resumed(model: nn.Module, checkpoint: str | Path) -> None:
    """Refuse a checkpoint whose weights mean something else than the model would take them for.

    Args:
        model: The model that is about to be trained.
        checkpoint: Folder of the checkpoint.

    Raises:
        ValueError: A setting differs, of which both values are named; the model is as it was.
    """
    for name, active, config in _routed_adapters(model):
        folder = _folder_of(Path(checkpoint), name, active)
        if folder is None:
            continue
        whose = f"the adapter {shown(name)} that is to be trained"
        if (folder / WEIGHTS).is_file():
            stamped = saved_meaning(read_header(folder / WEIGHTS))
            if stamped is not None:
                check_meaning(str(folder / WEIGHTS), stamped, config.meaning(), whose)
        beside = meaning_beside(str(folder), {})
        if beside is None:
            raise ValueError(
                f"{folder / CONFIG} is of an adapter type of another package, but {whose} is {type(config).__name__}. "
                "Resume with the settings of the run that wrote the checkpoint. Nothing has been changed."
            )
        check_meaning(str(folder / CONFIG), beside, config.meaning(), whose)


def check_finite_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Refuse to go on from weights that are not finite; of split ones each process looks at its own part.

    Args:
        model: The model, into which the checkpoint has been loaded.
        checkpoint: Its folder, for the message.

    Raises:
        ValueError: A weight of an adapter holds NaN or an infinity; all that do are named.
    """
    broken = []
    for place, layer in model.named_modules():
        if isinstance(layer, RoutedLayer):
            own = (part for bank in (layer.experts, layer.router) for part in bank.items())
            for adapter, part in own:
                for name, parameter in part.named_parameters():
                    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    if not bool(torch.isfinite(local.detach()).all()):
                        broken.append(f"{place}.{adapter}.{name}")
    if broken:
        raise ValueError(
            f"{checkpoint} holds NaN or infinite values in {len(broken)} tensors: {shown(broken)}. The run that saved "
            "it had diverged, or a file is damaged: resume from an earlier checkpoint."
        )


def write_missing_configs(model: nn.Module, checkpoint: str | Path) -> None:
    """Write what gives a checkpoint's weights their meaning where the trainer has not.

    Args:
        model: The model that is trained.
        checkpoint: Folder of the checkpoint, which has been written.
    """
    for name, _, config in _routed_adapters(model):
        folder = Path(checkpoint) if name == DEFAULT else Path(checkpoint) / name
        if Path(checkpoint).is_dir() and not (folder / CONFIG).is_file():
            training, config.inference_mode = config.inference_mode, True
            try:
                config.save_pretrained(str(folder))
            finally:
                config.inference_mode = training


def _routed_adapters(model: nn.Module) -> Iterator[tuple[str, str, MoeConfig]]:
    """Name of each routed adapter, of the one that is trained, and the configuration."""
    seen: set[int] = set()
    for module in model.modules():
        configs: Any = getattr(module, "peft_config", None)
        if not isinstance(configs, dict):
            continue
        layers = [layer for layer in module.modules() if isinstance(layer, RoutedLayer) and layer.active_adapters]
        active = layers[0].active_adapters[0] if layers else DEFAULT
        for name, config in configs.items():
            if isinstance(config, MoeConfig) and id(config) not in seen:
                seen.add(id(config))
                yield name, active, config


def _folder_of(checkpoint: Path, name: str, active: str) -> Path | None:
    """Where a checkpoint holds an adapter: a trainer takes what lies in no folder of its own for the active one."""
    if (checkpoint / name / CONFIG).is_file():
        return checkpoint / name
    at_root = DEFAULT if (checkpoint / active / CONFIG).is_file() else active
    return checkpoint if name == at_root and (checkpoint / CONFIG).is_file() else None
