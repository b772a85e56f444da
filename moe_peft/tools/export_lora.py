"""An adapter that equals a plain LoRA, as stock peft's files: W0 + s sum_e w_e B_e A_e = W0 + B A for constant w.

It holds with one expert, with constant routing, with logits of the layer, and with routing by task for one task. The
pair is [A_1; ...; A_E] and s [w_1 B_1, ..., w_E B_E], without a singular value decomposition and exact to rounding.

Engines read one rank and one scale of a file: pairs of less rank are filled up with zeros. Names of layers are short
(`q_proj`), as people write them, where they mean the same layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..files import new_folder
from ..layers import RoutedLayer, routed_layers
from ..messages import shown
from ..methods import ExpertLoraConfig
from ..tuner.merging import check_merges, plan_merges
from .beside import further_tensors
from .checks import check_peft_model
from .expert_lora_files import PREFIX, WEIGHTS, export_expert_lora
from .merge_for_task import decided
from .one_rank import of_one_rank
from .other_experts import routed_by_name

WAYS = (
    "Merge it into the weights (export_merged) where that is exact, distil it to one LoRA with a measured error "
    "(distil), or keep it as an adapter"
)


def export_lora(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", *, task: int | None = None
) -> None:
    """Write an adapter as a stock LoRA that equals it, and loads and serves without this package.

    Args:
        model: A model with the adapter, which is not changed; its base weights may be on the meta device.
        folder: The folder to make, with adapter_config.json and adapter_model.safetensors.
        adapter_name: Which adapter; one on the backbone's experts is written in the packing of stock peft's
            `target_parameters`.
        task: Task that is written, of an adapter whose router reads the task alone.

    Raises:
        TypeError: The model is no `PeftModel`.
        ValueError: No LoRA equals the adapter, or there are files at `folder`; nothing has been written.
    """
    check_peft_model(model, "export_lora")
    layers = [layer for layer in routed_layers(model) if adapter_name in layer.experts]
    if not layers:
        known = shown(sorted(getattr(model, "peft_config", {})))
        raise ValueError(f"No layer holds the adapter {shown(adapter_name)}; the model's adapters are {known}.")
    if isinstance(model.peft_config[adapter_name], ExpertLoraConfig):
        export_expert_lora(model, str(folder), adapter_name)
        return
    with decided(model, adapter_name, task):
        _check(model, layers, adapter_name)
        named = routed_by_name(model, adapter_name)
        pairs = {name: own.get_delta_factors(adapter_name) for name, own in named.items()}  # type: ignore[operator]
    with write_lora(model, folder, adapter_name, pairs):
        pass


@contextmanager
def write_lora(
    model: PeftModel, folder: str | Path, adapter_name: str, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[Path]:
    """Write pairs in the place of an adapter's experts as a stock LoRA, with what was trained beside them.

    Args:
        model: A model with the adapter.
        folder: The folder to make; it is there once the block ends without an error.
        adapter_name: Which adapter.
        pairs: Full name of each of its layers -> A (R, D) and B (O, R), with the scale in it.

    Yields:
        The folder while it is made, for further files.
    """
    config, tensors = _pairs(model, adapter_name, pairs)
    tensors |= further_tensors(model, adapter_name)
    with new_folder(folder) as growing:
        config.save_pretrained(str(growing))
        save_file(tensors, growing / WEIGHTS, metadata={"format": "pt"})
        yield growing


def _check(model: PeftModel, layers: list[RoutedLayer], adapter_name: str) -> None:
    other = next((layer for layer in layers if not layer.supports_lora_conversion(adapter_name)), None)
    if other is not None:
        raise ValueError(
            f"No single LoRA equals the adapter {shown(adapter_name)} at {other.place} ({type(other).__name__}): its "
            f"weights depend on the token, or it is no sum beside a weight. {WAYS}; an adapter that routes by task "
            "can be written for one of its tasks (task=0)."
        )
    base = model.get_base_model()
    plan = plan_merges(base, [adapter_name], layers[0].prefix, list(model.peft_config))
    check_merges(base, plan, safe_merge=False)


def _pairs(
    model: PeftModel, adapter_name: str, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The stock configuration, with one rank and the scale one, and the pairs by their names in a file."""
    tensors: dict[str, torch.Tensor] = {}
    rank, filled = of_one_rank(pairs)
    for name, pair in filled.items():
        for letter, factor in zip("AB", pair, strict=True):
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = factor.detach().cpu().clone().contiguous()
    layers = routed_by_name(model, adapter_name)
    transposed = any(isinstance(layers[name].get_base_layer(), Conv1D) for name in pairs)
    own: Any = model.peft_config[adapter_name]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_names(model.get_base_model(), pairs),
        modules_to_save=own.modules_to_save,
        trainable_token_indices=own.trainable_token_indices,
        fan_in_fan_out=transposed,
        task_type=own.task_type,
        inference_mode=True,
        base_model_name_or_path=own.base_model_name_or_path,
    )
    return config, tensors


def target_names(base: nn.Module, places: Collection[str]) -> list[str]:
    """Names for `target_modules`: the last parts of names, where they select these layers and no other; else in full.

    Args:
        base: The base model.
        places: Full names of layers.
    """
    last = {name.rpartition(".")[2] for name in places}
    selected = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if selected == set(places) else places)
