"""What the training scripts share: the adapter that the flags describe, and how the model is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from baselines import Baseline
from flags import CONFIGS, PREFIX, SCRIPT_FIELDS, MoeArguments, read_mapping, takes_mapping

import moe_peft
from moe_peft.config.config import MoeConfig

# Fields of TRL's ModelConfig that describe plain LoRA, which is `moe_method: lora` here, with our names of its fields.
PLAIN_LORA = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters")
PLAIN_LORA += ("lora_modules_to_save", "use_rslora", "use_dora")


def moe_config(arguments: MoeArguments, task_type: str = "CAUSAL_LM") -> MoeConfig | Baseline:
    """Build the adapter's configuration, or a baseline, from the flags.

    Args:
        arguments: Parsed flags; None keeps the method's default.
        task_type: peft's task type.

    Raises:
        ValueError: The method has no such field, or refuses its value.
    """
    config_cls = CONFIGS[arguments.moe_method]
    known = {f.name for f in dataclasses.fields(config_cls)}
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(arguments):
        value = getattr(arguments, entry.name)
        if entry.name in SCRIPT_FIELDS or value is None:
            continue
        name = entry.name.removeprefix(PREFIX)
        if name not in known:
            raise ValueError(
                f"--{entry.name} {value} has no meaning for --moe_method {arguments.moe_method}; remove it."
            )
        values[name] = value
    if values.get("target_modules") in (["all-linear"], ["all_linear"]):
        values["target_modules"] = "all-linear"
    if values.get("init_weights") in ("true", "True"):
        values["init_weights"] = True
    if takes_mapping("experts", arguments.moe_method) and isinstance(values.get("experts"), str):
        selection = read_selection(values["experts"])
        sizes = set(selection.num_experts.values())
        own = {
            "train_shared_experts": selection.shared_experts,
            **values,
            "experts": selection.experts,
            "num_backbone_experts": sizes.pop() if len(sizes) == 1 else None,
        }
        values = {name: value for name, value in own.items() if name in known}
    for name, value in values.items():
        if takes_mapping(name, arguments.moe_method):
            values[name] = read_mapping(PREFIX + name, value)
    return config_cls(task_type=task_type, **values)


def read_selection(path: str) -> moe_peft.ExpertSelection:
    """Read the experts to train from a file of `train/select_experts.py`, or of the ESFT authors.

    Args:
        path: The file, the value of `--moe_experts`.

    Raises:
        ValueError: There is no such file, or it has another form.
    """
    if not Path(path).is_file():
        what = "this is a folder" if Path(path).is_dir() else "there is no such file"
        raise ValueError(
            f"--moe_experts {path}: {what}. Select experts with moe-peft select-experts, and give the "
            "expert_config.json that it writes."
        )
    return moe_peft.ExpertSelection.load(path)


def refuse_plain_lora(model_args: Any) -> None:
    """Stop where TRL's own LoRA fields are set, which these scripts would otherwise ignore.

    Args:
        model_args: TRL's `ModelConfig`.

    Raises:
        ValueError: One of them differs from its default.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(model_args)}
    changed = [name for name in PLAIN_LORA if name in defaults and getattr(model_args, name) != defaults[name]]
    if changed:
        raise ValueError(
            f"{changed} describe plain LoRA. Describe the adapter with --moe_* flags, as --moe_r 4; "
            "stock LoRA is --moe_method lora."
        )


def model_init_kwargs(model_args: Any, training_args: Any, quantize_experts: bool = False) -> dict[str, Any]:
    """Arguments of `from_pretrained`, quantization included, in TRL's manner.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: The trainer's arguments.
        quantize_experts: Quantize fused experts to 4 bits too, which transformers leaves as they are.
    """
    from accelerate import PartialState
    from trl import get_quantization_config

    quantization = get_quantization_config(model_args)
    if quantization is not None and quantize_experts:
        quantization = moe_peft.MoeBitsAndBytesConfig.from_dict(quantization.to_dict())
    on_gpu = quantization is not None and torch.cuda.is_available()
    kwargs = {
        # The trainer moves the model, except a quantized one, which is packed where it will be. TRL's own default
        # would spread the layers over all GPUs that one process sees.
        "device_map": {"": PartialState().local_process_index} if on_gpu else None,
        "revision": model_args.model_revision,
        "trust_remote_code": getattr(training_args, "trust_remote_code", False),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    return kwargs
