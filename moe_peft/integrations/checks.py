"""What a trainer's settings ask of routed adapters that they cannot do: said before the first step."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..quantization.four_bit import Dequantize
from ..tuner.merging import check_merges, plan_merges
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
        ValueError: An active adapter cannot be merged.
    """
    plan = plan_merges(model, None, prefix=None, known=())
    names = sorted({name for merge in plan for name in merge.names})
    try:
        check_merges(model, plan, safe_merge=False)
    except ValueError as error:
        raise ValueError(
            f"use_vllm=True merges the adapter {', '.join(map(repr, names))} into the base weights at every weight "
            f"sync, which cannot be done: {error} Set use_vllm=False to generate with transformers."
        ) from error
