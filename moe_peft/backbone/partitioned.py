"""Parameters of which each process holds a part; those of DeepSpeed's ZeRO-3 are empty, with the whole's shape beside.

DeepSpeed gathers its own around the calls of their modules; what reads one outside of such a call gathers it itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Shape of a tensor as a whole.

    Args:
        tensor: A parameter, of which this process may hold a part, or any other tensor.
    """
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are not here, as ZeRO-3 has given its parts to the processes."""
    return shape_of(tensor) != tuple(tensor.shape)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Have the whole of a module's own parameters in the block; every process must enter it.

    Changes are lost. Nothing is gathered where tensors are only planned, inside `torch.device("meta")`.

    Args:
        module: The module; parameters of modules below it are left alone.
    """
    own = [parameter for parameter in module.parameters(recurse=False) if is_partitioned(parameter)]
    if not own or torch.get_default_device().type == "meta":
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(own):
        yield


def check_mergeable_here(base: nn.Module, place: str) -> None:
    """Refuse to merge into weights of which this process holds a part.

    Args:
        base: The module whose weights would be changed.
        place: Where it is, for the message.

    Raises:
        ValueError: One of them is split.
    """
    if any(isinstance(own, DTensor) or is_partitioned(own) for own in base.parameters(recurse=False)):
        raise ValueError(
            f"The weight of {place} ({type(base).__name__}) is split over processes, so nothing can be merged into it "
            "here. Save the adapter, and merge it into a model that one process holds whole."
        )
