"""What the training scripts share: the adapter's flags, the dry run, the data and the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

import moe_peft
from moe_peft.config import MoeConfig
from moe_peft.methods import METHODS

PREFIX = "moe_"
# Fields of TRL's ModelConfig that describe plain LoRA, which these scripts do not train.
PLAIN_LORA = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters")
PLAIN_LORA += ("lora_modules_to_save", "use_rslora", "use_dora")


@dataclass
class MoeArguments:
    """Fields of the adapter, with the prefix `moe_`; what is not given keeps the method's own default."""

    moe_method: str = field(default="loramoe", metadata={"help": "Adapter type.", "choices": sorted(METHODS)})
    moe_r: int | None = field(default=None, metadata={"help": "Rank of one expert."})
    moe_lora_alpha: float | None = field(default=None, metadata={"help": "The routed sum is times lora_alpha / r."})
    moe_lora_dropout: float | None = field(default=None, metadata={"help": "Dropout on the experts' input."})
    moe_use_rslora: bool | None = field(default=None, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    moe_init_weights: str | None = field(default=None, metadata={"help": "'gaussian', or 'true' for uniform A."})
    moe_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers to adapt, or all-linear; default: the method's places."}
    )
    moe_exclude_modules: list[str] | None = field(default=None, metadata={"help": "Modules to leave out."})
    moe_layers_to_transform: list[int] | None = field(default=None, metadata={"help": "Decoder layers to adapt."})
    moe_layers_pattern: str | None = field(default=None, metadata={"help": "Name of the layers' module list."})
    moe_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    moe_trainable_token_indices: list[int] | None = field(default=None, metadata={"help": "Token ids to train."})
    moe_num_experts: int | None = field(default=None, metadata={"help": "Experts at each adapted layer."})
    moe_top_k: int | None = field(default=None, metadata={"help": "Experts a token uses."})
    moe_router: str | None = field(default=None, metadata={"help": "Name of the router (method routed)."})
    moe_experts: str | None = field(default=None, metadata={"help": "Name of the expert kind (method routed)."})
    moe_router_aux_loss_coef: float | None = field(default=None, metadata={"help": "Weight of the balance loss."})
    moe_router_z_loss_coef: float | None = field(default=None, metadata={"help": "Weight of the router z-loss."})
    moe_router_jitter_noise: float | None = field(default=None, metadata={"help": "Noise on the router's input."})
    moe_norm_topk_prob: bool | None = field(default=None, metadata={"help": "Rescale kept weights to sum to one."})
    moe_routed_scaling_factor: float | None = field(default=None, metadata={"help": "Factor of all weights."})
    moe_expert_dropout: float | None = field(default=None, metadata={"help": "Probability of dropping a gate."})
    moe_capacity_factor: float | None = field(default=None, metadata={"help": "Capacity over the even share."})
    moe_capacity_order: str | None = field(default=None, metadata={"help": "Who is served first."})
    moe_allow_non_causal: bool | None = field(default=None, metadata={"help": "Permit parts that are not causal."})
    moe_experts_implementation: str | None = field(default=None, metadata={"help": "How the sum is computed."})
    moe_expert_groups: list[int] | None = field(default=None, metadata={"help": "Group of each expert."})
    moe_localized_balancing_delta: float | None = field(default=None, metadata={"help": "Shift towards groups."})
    moe_localized_balancing_mode: str | None = field(default=None, metadata={"help": "paper or specialize."})
    moe_group_column: str | None = field(
        default=None, metadata={"help": "Data column with the group of each sample, for localized balancing."}
    )
    moe_report: bool = field(
        default=False,
        metadata={
            "help": "Print held-out loss and an answer before and after, and the expert load; reload and compare."
        },
    )


SCRIPT_FIELDS = ("moe_method", "moe_report")


def moe_config(arguments: MoeArguments, task_type: str = "CAUSAL_LM") -> MoeConfig:
    """Build the adapter's configuration from the flags.

    Args:
        arguments: Parsed flags; None keeps the method's default.
        task_type: peft's task type.

    Raises:
        ValueError: The method has no such field, or refuses its value.
    """
    config_cls = METHODS[arguments.moe_method]
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
    return config_cls(task_type=task_type, **values)


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
        raise ValueError(f"{changed} describe plain LoRA. Describe the adapter with --moe_* flags, as --moe_r 4.")


def model_init_kwargs(model_args: Any, training_args: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained`, quantization included, in TRL's manner.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: The trainer's arguments.
    """
    from trl import get_kbit_device_map, get_quantization_config

    kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": getattr(training_args, "trust_remote_code", False),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        kwargs |= {"quantization_config": quantization, "device_map": get_kbit_device_map()}
    return kwargs


def dry_run(model_args: Any, training_args: Any, config: MoeConfig) -> moe_peft.describe:
    """Print which layers the adapter matches and what it trains, from the model's configuration alone.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: The trainer's arguments.
        config: The adapter's configuration.

    Returns:
        The description that was printed.

    Raises:
        ValueError: The configuration does not fit the model; nothing has been loaded yet.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    remote = {"trust_remote_code": getattr(training_args, "trust_remote_code", False)}
    model_config = AutoConfig.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, **remote
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, **remote)
    description = moe_peft.describe(model, config)
    if training_args.local_process_index == 0:
        print(description, flush=True)
    return description


def load_data(script_args: Any, dataset_args: Any) -> Any:
    """Load the data set: `datasets:` of the YAML file, or `--dataset_name`, which may be a folder of JSONL files.

    Args:
        script_args: TRL's `ScriptArguments`.
        dataset_args: TRL's `DatasetMixtureConfig`.

    Raises:
        ValueError: Neither or both are given.
    """
    from datasets import load_dataset
    from trl import get_dataset

    if bool(dataset_args.datasets) == bool(script_args.dataset_name):
        raise ValueError("Give either `datasets` (in the YAML file) or `--dataset_name`, and not both.")
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )
