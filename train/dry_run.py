"""The dry run: what an adapter would train, from the model's configuration alone, before any weight is loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from baselines import Baseline, BaselineDescription, adapter_of, describe
from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from moe_peft.backbone.without_weights import meta_model
from moe_peft.cli.errors import not_found
from moe_peft.config.config import MoeConfig
from moe_peft.describe import Description
from moe_peft.quantization.loading import expert_parameters, expert_sizes
from moe_peft.types import MoePeftWarning


def dry_run(
    model_args: Any,
    training_args: Any,
    config: MoeConfig | Baseline,
    model_config: Any,
    model: Any,
    quantize_experts: bool = False,
) -> Description | BaselineDescription:
    """Print which layers the adapter matches and what it trains, from the model's configuration alone.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: The trainer's arguments.
        config: The adapter's configuration.
        model_config: Configuration of the model to load.
        model: It on the meta device; see `model_without_weights`.
        quantize_experts: Whether fused experts will be loaded in 4 bits.

    Returns:
        The description that was printed.

    Raises:
        ValueError: The configuration does not fit the model; nothing has been loaded yet.
    """
    warn_of_backbone_loss(model_config, training_args)
    description = describe(model, config)
    whole = adapter_of(config) is None
    if training_args.local_process_index == 0:
        print(description, flush=True)
        if quantize_experts:
            print_expert_bytes(model, model_args)
        for name, count in ({} if whole else trained_in_full(model, description.config)).items():
            print(f"and {name} in full: {count:,} trainable parameters", flush=True)
    return description


def can_quantize_experts(model_args: Any, model: Any) -> bool:
    """Whether there are fused experts to quantize as they are loaded; a checkpoint may be quantized already.

    Args:
        model_args: TRL's `ModelConfig`.
        model: The model on the meta device.
    """
    quantized_already = getattr(model.config, "quantization_config", None)
    return model_args.load_in_4bit and not quantized_already and bool(expert_parameters(model))


def print_expert_bytes(model: Any, model_args: Any) -> None:
    """Print the size of a backbone's fused experts, before and after quantization.

    Args:
        model: The model on the meta device.
        model_args: TRL's `ModelConfig`.
    """
    dtype = getattr(torch, str(model_args.dtype), None) or model.config.dtype or torch.float32
    before, after = expert_sizes(model, dtype, model_args.use_bnb_nested_quant)
    name = str(dtype).removeprefix("torch.")
    print(f"Fused experts: {before / 1e6:,.1f} MB in {name}, {after / 1e6:,.1f} MB in 4 bits", flush=True)


def model_without_weights(model_args: Any, training_args: Any, task_type: str) -> tuple[Any, Any]:
    """The configuration of the model to load, and the model on the meta device.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: The trainer's arguments.
        task_type: peft's task type.

    Raises:
        ValueError: No model is named, or it cannot be found.
    """
    from transformers import AutoConfig

    check_model_name(model_args.model_name_or_path)
    remote = {"trust_remote_code": getattr(training_args, "trust_remote_code", False)}
    name = model_args.model_name_or_path
    try:
        model_config = AutoConfig.from_pretrained(name, revision=model_args.model_revision, **remote)
    except OSError as error:
        raise ValueError(not_found("--model_name_or_path", name, error)) from error
    return model_config, meta_model(model_config, task_type, **remote)


def check_model_name(name: str | None) -> None:
    """Refuse what names no model.

    Args:
        name: The value of `--model_name_or_path`.

    Raises:
        ValueError: It is missing, a file, or a folder that is not there or holds no model.
    """
    if not name:
        raise ValueError("--model_name_or_path is missing: give a model's name on the Hub, or its folder.")
    path = Path(name)
    if path.is_file():
        raise ValueError(f"--model_name_or_path {name} is a file. Give the folder with the model's config.json.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            what = "is the folder of an adapter; give its base model" if adapter else "holds no config.json"
            raise ValueError(f"--model_name_or_path {name} {what}. Give a model's name on the Hub, or its folder.")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"--model_name_or_path {name}: there is no such folder.")


def warn_of_backbone_loss(model_config: Any, training_args: Any) -> None:
    """Warn where TRL would add the balance loss of a mixture-of-experts backbone, whose routers are frozen here.

    Args:
        model_config: Configuration of the base model.
        training_args: The trainer's arguments; TRL's for rewards have no such loss.
    """
    text_config = model_config.get_text_config()
    coef = getattr(text_config, "router_aux_loss_coef", 0.0)
    if (
        hasattr(text_config, "output_router_logits")
        and coef
        and getattr(training_args, "router_aux_loss_coef", 0.0) is None
    ):
        warnings.warn(
            f"TRL adds the backbone's own balance loss, with its default weight router_aux_loss_coef={coef}. Its "
            "routers are frozen, so only the adapters below them would follow it. Write router_aux_loss_coef: 0.0 to "
            "leave it out, or the weight to keep it; the adapter's own is moe_router_aux_loss_coef.",
            MoePeftWarning,
            stacklevel=2,
        )


def trained_in_full(model: Any, config: MoeConfig | Baseline) -> dict[str, int]:
    """Modules that are trained and saved beside the adapter: those of `modules_to_save`, and a score head.

    Args:
        model: The base model.
        config: The adapter's configuration, its places resolved.

    Returns:
        Name -> number of parameters.
    """
    wanted = {*(config.modules_to_save or []), *(SEQ_CLS_HEAD_NAMES if config.task_type == "SEQ_CLS" else [])}
    endings = tuple(f".{name}" for name in wanted)
    found = {name: module for name, module in model.named_modules() if f".{name}".endswith(endings)}
    return {name: sum(p.numel() for p in module.parameters()) for name, module in found.items()}
