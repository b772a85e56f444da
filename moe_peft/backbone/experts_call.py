"""What an experts module is called with, told apart by type: the routing that the backbone really uses."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ExpertsCall:
    """What an experts module is called with: the routing that the backbone really uses.

    Attributes:
        hidden: (T, D) or (B, L, D) input.
        index: (T, K) integer expert of each slot; an index of E or more is a slot without an expert.
        weights: (T, K) its combine weight.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


def experts_call(args: tuple, kwargs: dict[str, Any]) -> ExpertsCall:
    """Tell the inputs of an experts module apart by their types.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: They are not hidden states, integer indices and floating weights.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    integer = [tensor for tensor in tensors if not tensor.is_floating_point()]
    if len(floating) != 2 or len(integer) != 1 or floating[1].shape != integer[0].shape:
        found = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        raise ValueError(
            f"An experts module was called with {found}, not with (T, D) hidden states, (T, K) integer indices and "
            "(T, K) weights. Use an adapter with a router of its own, around blocks or linear layers."
        )
    return ExpertsCall(floating[0], integer[0], floating[1])


def takes_routing(cls: type[nn.Module]) -> bool:
    """Whether modules of a class are called with hidden states, indices and weights."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in positional for parameter in parameters) >= 3


def has_local_indices(experts: nn.Module) -> bool:
    """Whether an experts module holds the experts of one process, and is called with indices into these alone.

    From transformers 5.23 on, expert parallelism replaces the module's forward with one that takes the indices of all
    experts, and exchanges the tokens itself.
    """
    return bool(getattr(experts, "_is_expert_parallel", False)) and "forward" not in vars(experts)
