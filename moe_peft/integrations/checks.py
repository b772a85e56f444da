"""What a trainer's settings ask of routed adapters that they cannot do: said before the first step."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..layers import RoutedLayer
from ..quantization.four_bit import Dequantize
from ..types import MoePeftWarning


def check_training(args: Any, model: nn.Module) -> None:
    """Refuse settings under which training would fail late, or silently go wrong.

    Args:
        args: The trainer's arguments.
        model: Its model.

    Raises:
        ValueError: vLLM would have to merge an adapter that cannot be merged, or several GPUs share one process.
    """
    if getattr(args, "use_vllm", False):
        check_vllm(model)
    if getattr(args, "use_transformers_continuous_batching", False) and (args.bf16 or args.fp16):
        warnings.warn(
            "use_transformers_continuous_batching=True turns the experts of the adapter to 16 bit for good at the "
            "first generation, and their small updates are rounded away. Set it to False, or bf16=False.",
            MoePeftWarning,
            stacklevel=3,
        )
    if has_four_bit_experts(model) and not args.gradient_checkpointing:
        warnings.warn(
            "gradient_checkpointing=False keeps the dequantized experts of all layers for the backward, which takes "
            "more memory than 4-bit experts save. Set gradient_checkpointing=True, which keeps one layer's at a time.",
            MoePeftWarning,
            stacklevel=3,
        )
    if getattr(args, "n_gpu", 0) > 1:
        raise ValueError(
            f"One process drives n_gpu={args.n_gpu} GPUs, for which the trainer takes torch.nn.DataParallel, whose "
            "copies of the model share no routing. Start one process per GPU with `accelerate launch`, or show this "
            "process a single GPU (CUDA_VISIBLE_DEVICES=0)."
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
        ValueError: An active adapter depends on its input.
    """
    for layer in model.modules():
        if not isinstance(layer, RoutedLayer):
            continue
        for name in layer.active_adapters:
            if name in layer.experts and not layer.is_mergeable(name):
                raise ValueError(
                    f"use_vllm=True merges the adapter {name!r} into the base weights at every weight sync, but it "
                    f"weighs its experts by the input of {layer.place} and cannot be merged. Set use_vllm=False to "
                    "generate with transformers, or train with num_experts=1, which merges exactly."
                )
