"""What a trainer's settings ask of routed adapters that they cannot do: said before the first step."""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn

from ..layers import RoutedLayer
from ..messages import shown, warn
from ..quantization.four_bit import Dequantize
from ..tuner.merging import check_merges, plan_merges
from .kernels import check_kernels

UNIT = re.compile(r".*?\.\d+\.")


def check_count(caller: str, name: str, value: Any) -> None:
    """Refuse what is no whole number, or a negative one.

    Args:
        caller: What was called, for the message.
        name: Name of the argument, zero of which switches something off.
        value: Its value.

    Raises:
        ValueError: It is.
    """
    if not is_count(value):
        raise ValueError(f"{caller}: {name}={shown(value)} must be 0 (off) or a positive whole number.")


def is_count(value: Any) -> bool:
    """Whether a value is a whole number that is not negative, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def check_adapter(model: nn.Module) -> None:
    """Refuse to train a model none of whose routed parameters would change.

    Args:
        model: The model that is about to be trained.

    Raises:
        ValueError: It has no routed adapter, or a frozen, disabled or merged one.
    """
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    if not layers:
        raise ValueError(
            f"attach: {type(model).__name__} has no routed adapter. Give the trainer a peft_config of moe_peft, or a "
            "model from peft.get_peft_model."
        )
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged and not any(layer.active_names() for layer in layers):
        raise ValueError(
            f"attach: the adapter {shown(merged[0])} is merged into the base weights, so that training would not "
            "change it. Call unmerge_adapter() first."
        )
    parameters = [parameter for layer in layers for parameter in adapter_parameters(layer)]
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "attach: the adapter is frozen, so that training would change nothing. Load it with "
            "PeftModel.from_pretrained(model, folder, is_trainable=True), or activate it with "
            "model.set_adapter(name), which also turns its gradients on."
        )


def adapter_parameters(layer: RoutedLayer) -> list[nn.Parameter]:
    """Parameters of a layer's active adapters: routers and experts."""
    return [
        parameter
        for bank in (layer.experts, layer.router)
        for name in layer.active_adapters
        if name in bank
        for parameter in bank[name].parameters()
    ]


def check_training(args: Any, model: nn.Module) -> None:
    """Refuse settings under which training would fail late, or silently go wrong.

    Args:
        args: The trainer's arguments.
        model: Its model.

    Raises:
        ValueError: Nothing would be trained, kernels pass an adapter by, vLLM would have to merge an adapter that
            cannot be merged, or several GPUs share one process.
    """
    check_adapter(model)
    check_kernels(model)
    if getattr(args, "use_vllm", False):
        check_vllm(model)
    if getattr(args, "use_transformers_continuous_batching", False) and (args.bf16 or args.fp16):
        warn(
            "use_transformers_continuous_batching=True turns the experts of the adapter to 16 bit for good at the "
            "first generation, and their small updates are rounded away. Set it to False, or bf16=False."
        )
    # transformers 5.23 calls it activation_checkpointing.
    checkpointing = getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False)
    if has_four_bit_experts(model) and not checkpointing:
        warn(
            "gradient_checkpointing=False keeps the dequantized experts of all layers for the backward, which takes "
            "more memory than 4-bit experts save. Set gradient_checkpointing=True, which keeps one layer's at a time."
        )
    if getattr(args, "n_gpu", 0) > 1:
        raise ValueError(
            f"One process drives n_gpu={args.n_gpu} GPUs, for which the trainer takes torch.nn.DataParallel, whose "
            "copies of the model share no routing. Start one process per GPU with `accelerate launch`, or show this "
            "process a single GPU (CUDA_VISIBLE_DEVICES=0)."
        )


def check_sharded_dtypes(trainer: Any) -> None:
    """Refuse what FSDP2 cannot split: trained parameters of two dtypes in one unit, which mixed precision makes one.

    Args:
        trainer: A trainer of transformers or TRL.

    Raises:
        ValueError: A layer has such parameters; nothing has been changed.
    """
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is None or accelerator.distributed_type != DistributedType.FSDP:
        return
    if accelerator.mixed_precision != "no":
        return
    first: dict[str, tuple[str, torch.dtype]] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            numbered = UNIT.match(name)  # FSDP's units are the decoder layers, and what is left
            own = name, parameter.dtype
            other = first.setdefault("" if numbered is None else numbered.group(), own)
            if other[1] != own[1]:
                raise ValueError(
                    f"attach: FSDP2 splits trained parameters of one dtype in a layer, but {other[0]} is {other[1]} "
                    f"and {own[0]} is {own[1]}. Set bf16=True in the trainer's arguments, with which all that is "
                    "trained is float32, load the base model in float32, or leave modules_to_save, train_router and "
                    "train_shared_experts off. Nothing has been changed."
                )


def has_four_bit_experts(model: nn.Module) -> bool:
    """Whether parameters of a model are dequantized where they are read, as experts in 4 bits are.

    Args:
        model: Any model.
    """
    return any(isinstance(module, Dequantize) for module in model.modules())


def check_vllm(model: nn.Module) -> None:
    """Refuse generation with vLLM, which merges adapters into the weights that it loads, where that is impossible.

    Args:
        model: A model with routed adapters.

    Raises:
        ValueError: An active adapter cannot be merged.
    """
    plan = plan_merges(model, None, prefix=None, known=())
    names = sorted({name for merge in plan for name in merge.names})
    try:
        check_merges(model, plan, safe_merge=False)
    except ValueError as error:
        raise ValueError(
            f"use_vllm=True merges the adapter {', '.join(map(shown, names))} into the base weights at every weight "
            f"sync, which cannot be done: {error} Set use_vllm=False to generate with transformers."
        ) from error
