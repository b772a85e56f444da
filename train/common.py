"""What the training scripts share: the adapter's flags, how the model is loaded, and the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import moe_peft
from moe_peft.config.config import MoeConfig
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
    moe_experts: str | None = field(
        default=None,
        metadata={"help": "Expert kind (routed, perft), or the expert_config.json of train/select_experts.py (esft)."},
    )
    moe_activation: str | None = field(default=None, metadata={"help": "Activation of the kind bottleneck."})
    moe_wraps: str | None = field(default=None, metadata={"help": "linear, block or experts (method routed)."})
    moe_variant: str | None = field(default=None, metadata={"help": "R, E, D or S (method perft)."})
    moe_expert_adapter: str | None = field(default=None, metadata={"help": "full or lora (method esft)."})
    moe_train_shared_experts: bool | None = field(default=None, metadata={"help": "Also train shared experts (esft)."})
    moe_train_router: bool | None = field(default=None, metadata={"help": "Also train the backbone's routers (esft)."})
    moe_feedforward_modules: list[str] | None = field(
        default=None, metadata={"help": "Targets that are scaled at their input (method mov)."}
    )
    moe_router_input: str | None = field(default=None, metadata={"help": "activation or hidden (method mov)."})
    moe_router_granularity: str | None = field(default=None, metadata={"help": "head or token (method mov)."})
    moe_head_dim: int | None = field(default=None, metadata={"help": "Width of a key or value head (method mov)."})
    moe_router_aux_loss_coef: float | None = field(default=None, metadata={"help": "Weight of the balance loss."})
    moe_router_z_loss_coef: float | None = field(default=None, metadata={"help": "Weight of the router z-loss."})
    moe_load_balancing_scope: str | None = field(
        default=None,
        metadata={"help": "micro_batch, global_batch or accumulation_window: over which tokens balance is measured."},
    )
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
    moe_router_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the routers; default: learning_rate."}
    )
    moe_lora_plus_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of the experts' up matrices over learning_rate (LoRA+)."}
    )
    moe_quantize_experts: bool = field(
        default=True, metadata={"help": "With load_in_4bit: quantize fused experts too, not linear layers alone."}
    )


# Flags that are no fields of the adapter.
SCRIPT_FIELDS = ("moe_method", "moe_quantize_experts", "moe_report", "moe_router_lr", "moe_lora_plus_ratio")


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
    if arguments.moe_method == "esft" and "experts" in values:
        selection = read_selection(values["experts"])
        values = {"train_shared_experts": selection.shared_experts, **values, "experts": selection.experts}
        sizes = set(selection.num_experts.values())
        values["num_backbone_experts"] = sizes.pop() if len(sizes) == 1 else None
    return config_cls(task_type=task_type, **values)


def read_selection(path: str) -> moe_peft.ExpertSelection:
    """Read the experts to train from a file of `train/select_experts.py`, or of the ESFT authors.

    Args:
        path: The file, the value of `--moe_experts`.

    Raises:
        ValueError: There is no such file, or it has another form.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"--moe_experts {path}: there is no such file. Select experts with train/select_experts.py, and give the "
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
        raise ValueError(f"{changed} describe plain LoRA. Describe the adapter with --moe_* flags, as --moe_r 4.")


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


def splits(dataset: Any, script_args: Any, evaluates: bool) -> tuple[Any, Any]:
    """The rows to train on, and those to evaluate on.

    Args:
        dataset: Split name -> rows.
        script_args: TRL's `ScriptArguments`.
        evaluates: Whether the second split is needed.

    Returns:
        Both; None for the second where it is not needed.

    Raises:
        ValueError: The data has no split of that name.
    """
    wanted = {"dataset_train_split": script_args.dataset_train_split}
    if evaluates:
        wanted["dataset_test_split"] = script_args.dataset_test_split
    for flag, name in wanted.items():
        if name not in dataset:
            raise ValueError(
                f"--{flag} {name}: the data has the splits {sorted(dataset)}. Name one of them, set test_split_size "
                "with `datasets`, or switch evaluation off with --eval_strategy no."
            )
    return dataset[script_args.dataset_train_split], dataset[wanted["dataset_test_split"]] if evaluates else None
