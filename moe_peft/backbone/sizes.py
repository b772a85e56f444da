"""How many weights a model has: packed ones count as what they stand for, those of adapters do not count."""

from __future__ import annotations

import math

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .partitioned import shape_of


def num_base_weights(model: nn.Module) -> int:
    """Count the weights of a backbone.

    Args:
        model: Any model, with or without adapters; its linear layers, and its experts, may be quantized.
    """
    counted = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.adapter_layer_names
        for parameter in getattr(layer, name).parameters()
    }
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                total += _num_weights(module, parameter)
    return total


def _num_weights(module: nn.Module, parameter: nn.Parameter) -> int:
    """Weights of one parameter, of which packing puts several into one element."""
    # bitsandbytes keeps the shape at the parameter of a linear layer, and at the parametrization of any other.
    holder = module[0] if isinstance(module, ParametrizationList) else parameter
    return math.prod(getattr(getattr(holder, "quant_state", None), "shape", shape_of(parameter)))
