"""Turns what must not be rounded back to float32, where a trainer cast trainable parameters to 16 bit."""

from __future__ import annotations

import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from ..layers import SlicedExperts
from ..part import ModulePart
from .checks import has_four_bit_experts


def restore_precision(model: nn.Module) -> int:
    """Turn parameters that were cast to 16 bit back to float32, where rounding would undo their training.

    Rounded scores of routers change which experts are selected. Vectors near one, and copies of the backbone's experts
    have no room in 16 bit for small steps; of copies those of 4-bit experts, which trainers cast, as peft keeps others
    in the precision that was asked for.

    Parameters that FSDP split over processes keep their dtype, which its mixed precision sets to float32. Do not call
    it on a model that DeepSpeed holds: it owns the storage, and keeps a float32 copy in its optimizer. Scores are
    computed in float32 from weights of any dtype.

    Args:
        model: A model with routed adapters.

    Returns:
        Number of parameters that were cast.
    """
    modules = [module for module in model.modules() if isinstance(module, ModulePart) and module.keeps_float32]
    for layer in (module for module in model.modules() if isinstance(module, SlicedExperts)):
        if has_four_bit_experts(layer.get_base_layer()):
            modules.extend(layer.experts.values())
    parameters = [parameter for module in modules for parameter in module.parameters()]
    rounded = [p for p in parameters if p.dtype in (torch.bfloat16, torch.float16) and not isinstance(p, DTensor)]
    for parameter in rounded:
        parameter.data = parameter.data.float()
    return len(rounded)


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Whether DeepSpeed holds the weights of the model that is trained."""
    state = args.distributed_state
    return state is not None and state.distributed_type == DistributedType.DEEPSPEED
