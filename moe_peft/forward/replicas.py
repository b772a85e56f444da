"""Adapters that were added to a model after it was split over processes, of which each process holds a copy.

What splits a model (fully_shard, distributed_config) manages the tensors that it finds. An adapter that comes later is
a plain tensor beside them: nobody broadcasts its first values, and nobody adds up its gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..messages import shown
from .processes import num_processes

ALONE = (
    "The adapter {} was added to a model that FSDP had split over processes, and FSDP leaves it alone: each process "
    "trains a copy of its own on its own batches, and the copies drift apart. Call "
    "moe_peft.synchronize_adapters(model) once before training, or add the adapter before sharding. transformers' "
    "Trainer does it by itself."
)
DIFFERENT = (
    "The processes that share this model hold different values of the adapter {}, so each computes another model. "
    "Call moe_peft.synchronize_adapters(model) once before training, or transformers.set_seed with one seed on every "
    "process before the adapter is added."
)


def is_split(model: nn.Module) -> bool:
    """Whether processes share the tensors of a model: FSDP2, tensor or expert parallelism."""
    return num_processes() > 1 and (
        any(isinstance(module, FSDPModule) for module in model.modules())
        or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    )


def synchronize_adapters(model: nn.Module) -> None:
    """Make the copies of an adapter one, in a loop of one's own on a model that was split before the adapter came.

    The first process's values go to all processes, and every backward leaves the mean of all processes' gradients.
    It is for models from `distributed_config`, or sharded with FSDP2, that are given adapters afterwards; where the
    adapter came first, FSDP2 and DDP do it, and in a trainer transformers does. Call it once, in every process, after
    the adapter has been added or loaded. With a single process nothing happens.

    Args:
        model: A model with adapters. All of its trainable tensors that are not split are meant, those of peft's
            `modules_to_save` and of other adapter types too.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"synchronize_adapters: model={shown(model)} must be a model with adapters.")
    if num_processes() == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            dist.broadcast(parameter.data, src=0)
            if not _is_looked_after(parameter):
                parameter.register_post_accumulate_grad_hook(_average_gradient)


def warning_of(model: nn.Module, adapter_name: str) -> str | None:
    """What is to be said of an adapter that came to a split model, in a training forward without a trainer.

    Every process that holds a part of the model must call it.

    Args:
        model: The model.
        adapter_name: The adapter.
    """
    copies = [
        parameter
        for name, parameter in model.named_parameters()
        if f".{adapter_name}." in name and parameter.requires_grad and not isinstance(parameter, DTensor)
    ]
    if not copies or all(_is_looked_after(parameter) for parameter in copies):
        return None
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return ALONE.format(shown(adapter_name))
    groups = _sharing(parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
    differing = [_differ(copies, group) for group in groups]  # in every group, as its other processes ask too
    return DIFFERENT.format(shown(adapter_name)) if any(differing) else None


def _average_gradient(parameter: torch.Tensor) -> None:
    # What earlier backwards left is the same on all processes, so that the mean leaves it as it is.
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= num_processes()


def _is_looked_after(parameter: nn.Parameter) -> bool:
    """Whether somebody acts on each gradient, as transformers' trainer and `synchronize_adapters` do to average it."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _sharing(tensors: Iterable[DTensor]) -> list[dist.ProcessGroup]:
    """The groups of processes over which tensors are split."""
    meshes = {tensor.device_mesh: None for tensor in tensors}
    groups = {group.group_name: group for mesh in meshes for group in mesh.get_all_groups()}
    return list(groups.values())


def _differ(tensors: list[nn.Parameter], group: dist.ProcessGroup) -> bool:
    """Whether the processes of a group hold different values."""
    with torch.no_grad():
        sums = [value for own in tensors for value in (own.double().sum(), own.double().square().sum())]
        own = torch.stack([value.to(sums[0].device) for value in sums])
    least, most = own.clone(), own.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return not torch.equal(least, most)
