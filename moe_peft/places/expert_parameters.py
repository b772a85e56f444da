"""Names of a model's fused expert matrices, as `LoraConfig(target_parameters=...)` of stock peft takes them."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from ..backbone.partitioned import shape_of
from ..backbone.structure import FIRST_MATRICES, base_of, find_moe_layers, opaque_blocks, unsupported_reason
from .linear import shortest_endings

MATRICES = (*FIRST_MATRICES, "down_proj")


def expert_parameters(model: nn.Module) -> list[str]:
    """The fused matrices of the experts of a language model.

    `LoraConfig(target_modules=[], target_parameters=moe_peft.expert_parameters(model))` puts a low-rank pair on each
    matrix of each expert, and `moe_peft.accelerate_expert_lora` makes it fast.

    Args:
        model: A transformers model, with or without adapters.

    Returns:
        Shortest endings of parameter names that match these matrices and nothing else, sorted.

    Raises:
        ValueError: The model has none that stock peft reaches; the message says why and what to use instead.
    """
    holders = [layer.experts for layer in find_moe_layers(model)] or list(opaque_blocks(model))
    names = [
        f"{_unwrapped(holder)}.{name}"
        for holder in holders
        for name, parameter in base_of(model.get_submodule(holder)).named_parameters()
        if _is_matrix(name, parameter)
    ]
    if any(parametrize.is_parametrized(base_of(model.get_submodule(holder))) for holder in holders):
        raise ValueError(
            f"The experts of {type(model).__name__} are quantized to 4 bits, where stock peft's LoRA has no effect on "
            "all but one of their matrices. Use the expert LoRA of moe_peft, or load the experts in 16 bit."
        )
    if not names:
        reason = "its experts are no 3-D parameters" if holders else unsupported_reason(model) or "it is a dense model"
        raise ValueError(
            f"{type(model).__name__} has no fused expert matrices that stock peft reaches by target_parameters: "
            f"{reason}. Use target_modules for linear layers, or an adapter of moe_peft around blocks or experts."
        )
    every = {_unwrapped(name) for name, _ in model.named_parameters()}
    return shortest_endings(names, every - set(names))


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter below an experts module, or below a block without one, is a matrix of each expert."""
    leaf = name.rpartition(".")[2]
    return len(shape_of(parameter)) == 3 and (leaf in MATRICES or leaf == "weight")


def _unwrapped(name: str) -> str:
    """A parameter's name as peft compares it, without the layers that adapters put around modules."""
    return name.replace(".base_layer", "")
