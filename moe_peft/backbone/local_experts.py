"""The experts of a layer that one process holds, and what layers around them do where these are computed.

Under expert parallelism a process holds some of a layer's experts, and transformers brings it the tokens that they
take. An adapter that is split like the experts acts in the same place, on the rows and the local expert ids that the
process was sent. `DistributedConfig(ep_implementation="moe_peft")` loads a model so: tokens travel as with "auto".
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NAME = "moe_peft"
SLOT = "_moe_peft_local_experts"
# What a refusal of experts of which processes hold parts recommends.
SPLIT_LIKE_EXPERTS = (
    "Load the model with DistributedConfig(tp_size=N, tp_plan='auto', ep_size=N, ep_implementation='moe_peft'), or "
    "with fsdp_size=N in the place of tp_size, which splits the adapter like the experts."
)
# (N, D) hidden states, (N, K) local expert ids, (N, K) weights -> (N, O).
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# The same with what is computed without the change in front.
Change = Callable[[Compute, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_replicas: list[tuple[weakref.ref[DeviceMesh], dist.ProcessGroup]] = []


class LocalExperts:
    """What computes the experts of one process.

    Args:
        experts: The experts module, whose forward takes local ids.
        mesh: The processes that hold all experts together, each as many.
        num_batches: Batches that all processes have at a time, whose mean is trained on.

    Attributes:
        num_experts: Experts that this process holds.
        mesh: As given.
        rank: Place of this process in the mesh.
        replicas: Processes with the same experts, which are this one among; None where there are no others.
    """

    def __init__(self, experts: nn.Module, mesh: DeviceMesh, num_batches: int) -> None:
        self.own: Compute = experts.forward
        self.num_experts: int = experts.num_experts  # type: ignore[assignment]
        self.mesh, self.num_batches = mesh, num_batches
        self.rank = mesh.get_local_rank()
        self.replicas = _replicas_of(mesh)
        self._replaces: list[Change] = []
        self._changes: list[Change] = []

    def __call__(self, hidden_ND: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Compute rows as the module does, and as the layers around it change it in this call.

        Args:
            hidden_ND: (N, D) rows that this process was sent.
            index_NK: (N, K) local expert ids; the number of local experts for a slot of another process.
            weights_NK: (N, K) combine weights.

        Returns:
            (N, O).
        """
        compute = self.own
        for change in (*self._replaces, *self._changes):
            compute = partial(change, compute)
        return compute(hidden_ND, index_NK, weights_NK)

    @contextmanager
    def changed(self, change: Change, *, replaces: bool = False) -> Iterator[None]:
        """Change what is computed for the calls of the module in the block.

        Args:
            change: Given what is computed without it.
            replaces: Whether it computes the experts in another way, rather than beside them: what is beside them
                stays beside it, whichever layer is the outer one.
        """
        changes = self._replaces if replaces else self._changes
        changes.append(change)
        try:
            yield
        finally:
            changes.remove(change)

    def read(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part of a split tensor that is here, whose gradient is that of the mean over all batches.

        Args:
            parameter: Split over `mesh`.

        Returns:
            A local tensor in the autograd graph.
        """
        local: torch.Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not local.requires_grad or (self.num_batches == 1 and self.replicas is None):
            return local
        read: torch.Tensor = _MeanOverBatches.apply(local, self.num_batches, self.replicas)
        return read

    def __deepcopy__(self, memo: Any) -> LocalExperts:
        """A copy of a module keeps the forward that transformers gave it, and with it this object."""
        return self


def local_experts(experts: nn.Module) -> LocalExperts | None:
    """What computes the experts of this process, where a module was loaded so that adapters can be split like it.

    Args:
        experts: An experts module, or any other.
    """
    found: LocalExperts | None = experts.__dict__.get(SLOT)
    return found


def is_split_alone(experts: nn.Module) -> bool:
    """Whether processes hold parts of a module's tensors, and adapters cannot be split like them.

    Args:
        experts: An experts module.
    """
    expert_parallel = bool(getattr(experts, "_is_expert_parallel", False))
    split = expert_parallel or any(isinstance(own, DTensor) for own in experts.parameters())
    return split and local_experts(experts) is None


class _MeanOverBatches(torch.autograd.Function):
    """Identity. Gradients are added up over processes with the same experts, and divided by the number of batches.

    A process's experts are sent tokens of all batches of the group, each with the gradient of its own batch's loss.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, num_batches: int, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.num_batches, ctx.group = num_batches, group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        own = gradients[0] / ctx.num_batches
        if ctx.group is not None:
            dist.all_reduce(own, group=ctx.group)
        return own, None, None


def _replicas_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The processes that have the same place in other meshes of the kind; every process must ask."""
    if mesh.size() == dist.get_world_size():
        return None
    for known, group in _replicas:
        if known() is mesh:
            return group
    meshes: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(meshes, dist.get_process_group_ranks(mesh.get_group()))
    mine: dist.ProcessGroup | None = None
    for place in range(mesh.size()):
        ranks = sorted({own[place] for own in meshes})
        group = dist.new_group(ranks)
        mine = group if dist.get_rank() in ranks else mine
    assert mine is not None
    _replicas.append((weakref.ref(mesh), mine))
    return mine


def offer_loading() -> None:
    """Offer the way of loading under its name, once, with releases of transformers that have the registry (5.23)."""
    try:
        from transformers.distributed.expert_parallel import AutoEP, EPImplementationInterface
    except ImportError:
        return
    if NAME in EPImplementationInterface():
        return

    class AdaptedEP(AutoEP):
        """Brings tokens as "auto" does, to experts that layers around them may change."""

        def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            local = LocalExperts(experts, ep_mesh, dist.get_world_size() // tp_mesh.size())
            for way in (self.all_to_all, self.all_reduce):
                if way is not None:
                    way.experts_forward = local
            experts.__dict__[SLOT] = local

        def __call__(
            self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            # Adapters beside the experts have gradients also where the tokens' come from nothing that is trained.
            if self.all_reduce is not None and not torch.is_grad_enabled():
                out: torch.Tensor = self.all_reduce(hidden_states, top_k_index, top_k_weights)
            else:
                out = self.all_to_all(hidden_states, top_k_index, top_k_weights)
            return out

    EPImplementationInterface.register(NAME, AdaptedEP)
