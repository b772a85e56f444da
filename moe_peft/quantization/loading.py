"""4-bit for a whole mixture-of-experts model: fused experts are quantized as they are loaded, routers never are.

transformers' own 4-bit loading quantizes linear layers alone. Fused experts, nearly all of such a model, stay in the
dtype they were loaded in, and a router that is a linear layer is quantized.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationMethod

from ..backbone.structure import find_moe_layers, opaque_blocks, router_names
from .four_bit import dequantize, dequantize_on_read, four_bit_bytes, quantize

METHOD = "bitsandbytes_moe"

logger = logging.getLogger(__name__)

# A second import of this module registers its own classes, which transformers otherwise refuses.
for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    mapping.pop(METHOD, None)


@register_quantization_config(METHOD)
class MoeBitsAndBytesConfig(BitsAndBytesConfig):
    """`BitsAndBytesConfig(load_in_4bit=True)` that quantizes fused experts too, and leaves routers as they are.

    Every other argument is that of `BitsAndBytesConfig`. Modules named in `llm_int8_skip_modules` stay as they are,
    experts too. The quantized base cannot be saved; adapters on it are, as ever.

    Args:
        load_in_4bit: Only True; experts have no 8-bit form.
        **kwargs: Arguments of `BitsAndBytesConfig`, as `bnb_4bit_quant_type="nf4"`.

    Raises:
        ValueError: 8 bits were asked for, or no quantization.
    """

    def __init__(self, load_in_4bit: bool = True, **kwargs: Any) -> None:
        if kwargs.get("load_in_8bit") or not load_in_4bit:
            asked = f"load_in_4bit={load_in_4bit}, load_in_8bit={kwargs.get('load_in_8bit', False)}"
            raise ValueError(
                f"MoeBitsAndBytesConfig({asked}): fused experts are quantized to 4 bits only. Write "
                "MoeBitsAndBytesConfig(), or transformers' BitsAndBytesConfig(load_in_8bit=True) for the linear "
                "layers alone."
            )
        super().__init__(load_in_4bit=True, **kwargs)
        self.quant_method = METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """The arguments, without those that make transformers read the dict as one of its own quantization."""
        return {name: value for name, value in super().to_dict().items() if not name.lstrip("_").startswith("load_in")}


@register_quantizer(METHOD)
class MoeBnb4BitQuantizer(Bnb4BitHfQuantizer):
    """Quantizes a model while it is loaded, one stack of experts after the other.

    Attributes:
        expert_bytes: Full name of each expert tensor -> its bytes before; empty until the model is built.
        quantized_bytes: The same -> its bytes after, known once it is quantized.
        mismatched: Those that have another shape in the checkpoint, of which transformers takes care.
    """

    def __init__(self, quantization_config: MoeBitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.expert_bytes: dict[str, int] = {}
        self.quantized_bytes: dict[str, int] = {}
        self._states: dict[str, Any] = {}
        self.mismatched: set[str] = set()

    @staticmethod
    def get_modules_to_not_convert(model: Any, *args: Any, **kwargs: Any) -> list[str]:
        """The modules that transformers leaves out, and all that decide about experts."""
        return [*Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *args, **kwargs), *sorted(router_names(model))]

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        self.expert_bytes = {
            name: model.get_parameter(name).nbytes
            for name in expert_parameters(model)
            if should_convert_module(name.rpartition(".")[0], self.modules_to_not_convert)
        }

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is quantized: a linear layer's, or one of the experts'."""
        if param_name in self.expert_bytes:
            return param_name not in self.mismatched
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes a tensor that has been read."""
        return _Quantize(self, super().get_quantize_ops())

    def quantize(self, name: str, weight: torch.Tensor) -> nn.Parameter:
        """Quantize one tensor of the experts.

        Args:
            name: Its full name.
            weight: (E, ...) floating.
        """
        config = self.quantization_config
        packed, self._states[name] = quantize(
            weight, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_storage
        )
        self.quantized_bytes[name] = four_bit_bytes(weight.numel(), config.bnb_4bit_use_double_quant)
        return packed

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        for name in self.expert_bytes:
            module_name, _, leaf = name.rpartition(".")
            parameter = model.get_parameter(name)
            # One that the checkpoint lacks has been initialized after the others were read.
            packed = parameter if name in self._states else self.quantize(name, parameter)
            dequantize_on_read(model.get_submodule(module_name), leaf, packed, self._states.pop(name))
        # What trainers and transformers know not to move or cast.
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        before, after = sum(self.expert_bytes.values()), sum(self.quantized_bytes.values())
        logger.info(
            "%d expert tensors in 4 bits: %s bytes -> %s bytes", len(self.expert_bytes), f"{before:,}", f"{after:,}"
        )
        return model

    def is_serializable(self) -> bool:
        """No: the checkpoint's form, one tensor for each expert, cannot be made from 4-bit stacks."""
        return False

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        # Adapters may have wrapped the experts since, so their names are not those of the checkpoint.
        for module in list(model.modules()):
            dequantize(module, dtype)
        model.is_loaded_in_4bit = False
        return super()._dequantize(model, dtype=dtype)


class _Quantize(ConversionOps):
    """Quantizes experts, and leaves linear layers to the operation of transformers."""

    def __init__(self, quantizer: MoeBnb4BitQuantizer, of_linear_layers: ConversionOps) -> None:
        self.quantizer = quantizer
        self.of_linear_layers = of_linear_layers

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> dict[str, Any]:
        model = kwargs["model"]
        experts = [name for name in input_dict if name in self.quantizer.expert_bytes]
        others = {name: value for name, value in input_dict.items() if name not in experts}
        result: dict[str, Any] = {}
        if others:
            result |= self.of_linear_layers.convert(
                others, source_patterns=source_patterns, target_patterns=target_patterns, **kwargs
            )
        for name in experts:
            value = input_dict[name]
            weight = value[0] if isinstance(value, list) else value
            own = model.get_parameter(name)
            if weight.shape != own.shape:
                self.quantizer.mismatched.add(name)
                result[name] = weight
                continue
            # In the dtype that the model was to be loaded in, which is the dtype that dequantization will give.
            result[name] = self.quantizer.quantize(name, weight.to(own.dtype))
        return result


def expert_parameters(model: nn.Module) -> list[str]:
    """Full names of the fused tensors of a backbone's experts: three dimensions, the first one the expert.

    Args:
        model: A model without adapters, on any device.
    """
    places = [layer.experts for layer in find_moe_layers(model)] + list(opaque_blocks(model))
    return [
        f"{place}.{name}"
        for place in places
        for name, parameter in model.get_submodule(place).named_parameters()
        if parameter.dim() == 3 and parameter.is_floating_point()
    ]


def expert_sizes(model: nn.Module, dtype: torch.dtype, double_quant: bool = False) -> tuple[int, int]:
    """Bytes of a model's fused experts, as they are and in 4 bits.

    Args:
        model: A model without adapters, also on the meta device.
        dtype: In which they would be loaded otherwise.
        double_quant: Whether the scales are quantized too.
    """
    counts = [model.get_parameter(name).numel() for name in expert_parameters(model)]
    return sum(counts) * dtype.itemsize, sum(four_bit_bytes(count, double_quant) for count in counts)
