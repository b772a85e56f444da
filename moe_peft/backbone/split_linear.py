"""A linear layer that tensor parallelism splits over processes, seen by adapters with whole inputs and outputs.

Under a tensor-parallel plan of transformers a column-wise layer gives each process its slice of the output, a row-wise
one is given its slice of the input. Adapters are whole on every process: they read the gathered input, and each
process keeps its slice of what they give. Gradients of both are whole again on every process, so that adapters stay
equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..messages import shown

# The dimension of transformers' device meshes over which tensor parallelism splits.
DIMENSION = "tp"


@dataclass(frozen=True)
class Slices:
    """How a dimension is cut over the processes of a group, as distributed tensors are: equal pieces but the last.

    Attributes:
        width: Of the whole dimension.
        count: Number of processes.
        rank: This process's piece.
        group: The processes.
    """

    width: int
    count: int
    rank: int
    group: Any

    @property
    def piece(self) -> int:
        """Width of all pieces but the last ones."""
        return -(-self.width // self.count)

    @property
    def own(self) -> slice:
        """Where this process's piece lies."""
        start = min(self.rank * self.piece, self.width)
        return slice(start, min(start + self.piece, self.width))

    def whole(self, piece: torch.Tensor) -> torch.Tensor:
        """(..., own width) of each process -> (..., width), the same on all."""
        return _Whole.apply(piece, self)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """(..., width), the same on all processes -> this process's (..., own width)."""
        return _Part.apply(whole, self)

    def gather(self, piece: torch.Tensor) -> torch.Tensor:
        """`whole` without a gradient."""
        padded = nn.functional.pad(piece, (0, self.piece - piece.shape[-1])).contiguous()
        pieces = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(pieces, padded, group=self.group)
        return torch.cat(pieces, dim=-1)[..., : self.width]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: torch.Tensor, slices: Slices) -> torch.Tensor:
        ctx.slices = slices
        return slices.gather(piece)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[..., ctx.slices.own].contiguous(), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, slices: Slices) -> torch.Tensor:
        ctx.slices = slices
        return whole[..., slices.own].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.slices.gather(grad), None


def is_split(base: nn.Module) -> bool:
    """Whether tensor parallelism has replaced the forward of a module and split its weight."""
    return "forward" in vars(base) and isinstance(base._parameters.get("weight"), DTensor)


class WholeLinear:
    """One call of a split layer, with whole inputs and outputs.

    Args:
        base_layer: What computes it: the layer, or what is wrapped around it.
        base: The layer, which `is_split`.
        in_features: D, of the whole input.
        out_features: O, of the whole output.
    """

    def __init__(self, base_layer: nn.Module, base: Any, in_features: int, out_features: int) -> None:
        mesh = base.weight.device_mesh
        mesh = mesh if mesh.ndim == 1 else mesh[DIMENSION]
        process = mesh.size(), mesh.get_local_rank(), mesh.get_group()
        self.base_layer, self.inputs, self.outputs = (
            base_layer,
            Slices(in_features, *process),
            Slices(out_features, *process),
        )
        self.splits_input = self.splits_output = False

    def whole_input(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) from what the model gives the layer."""
        self.splits_input = x.shape[-1] != self.inputs.width
        return self.inputs.whole(x) if self.splits_input else x

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute (..., O) from a whole input (..., D)."""
        out = self.base_layer(self.inputs.part(x) if self.splits_input else x, *args, **kwargs)
        self.splits_output = out.shape[-1] != self.outputs.width
        return self.outputs.whole(out) if self.splits_output else out

    def own_part(self, out: torch.Tensor) -> torch.Tensor:
        """What the model expects of the layer, from a whole output."""
        return self.outputs.part(out) if self.splits_output else out


def why_not_whole(base: nn.Module) -> str | None:
    """Why adapters cannot see a split layer as a whole one; None where they can.

    Args:
        base: A layer that `is_split`.

    Returns:
        The end of a sentence that begins with the layer.
    """
    weight: Any = base.weight
    names = weight.device_mesh.mesh_dim_names or ()
    if weight.device_mesh.ndim > 1 and DIMENSION not in names:
        return f"is split over a mesh without a dimension called {shown(DIMENSION)}"
    placement = weight.placements[names.index(DIMENSION) if weight.device_mesh.ndim > 1 else 0]
    if not isinstance(placement, (Shard, Replicate)):
        return "is split so that several matrices in one are cut each on its own (a packed style)"
    return None
