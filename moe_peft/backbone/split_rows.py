"""Tensors with one row for each expert, of which every process holds the rows of its own experts.

In a process they are distributed tensors of equal parts: each has as many rows as the process with the most, and
what is missing is zero, used by no token. In a file they are whole, one row for each expert, in the experts' order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from .local_experts import LocalExperts


class SplitRows:
    """Where the rows of n experts lie.

    Args:
        local: The experts of this process.
        num_experts: E, experts that all processes hold together.
        ids: The experts that have a row, n of them, ascending; None for all.

    Attributes:
        size: Rows that each process holds.
        own: Which of the n rows are this process's.
        ids: Their experts by local ids.

    Raises:
        ValueError: The processes do not hold equal parts of the experts.
    """

    def __init__(self, local: LocalExperts, num_experts: int, ids: Sequence[int] | None) -> None:
        held, processes = local.num_experts, local.mesh.size()
        if held * processes != num_experts:
            raise ValueError(
                f"{processes} processes hold {held} experts each of the {num_experts} experts of a layer, so an "
                "adapter cannot be split like them. Load the model with ep_implementation='auto', and use an adapter "
                "with a router of its own, around blocks or linear layers."
            )
        chosen = range(num_experts) if ids is None else ids
        by_process = [[row for row, e in enumerate(chosen) if e // held == process] for process in range(processes)]
        self.local = local
        self.size = max(map(len, by_process))
        self.own = tuple(by_process[local.rank])
        self.ids = tuple(chosen[row] - held * local.rank for row in self.own)
        self._places = [p * self.size + place for p, rows in enumerate(by_process) for place in range(len(rows))]
        self._tables: dict[torch.device, torch.Tensor] = {}

    def table(self, device: torch.device) -> torch.Tensor:
        """(E' + 1,) int64 row of each of this process's E' experts, and of none, here; `size` where it has none.

        Args:
            device: Where the table is needed.
        """
        if device not in self._tables:
            table = torch.full((self.local.num_experts + 1,), self.size, device=device)
            table[list(self.ids)] = torch.arange(len(self.ids), device=device)
            self._tables[device] = table
        return self._tables[device]

    def rows_of(self, index_NK: torch.Tensor) -> torch.Tensor:
        """(N, K) row of each slot's expert here, `size` where it has none.

        Args:
            index_NK: (N, K) local expert ids, the number of local experts for slots of other processes.
        """
        return self.table(index_NK.device)[index_NK.clamp(max=self.local.num_experts)]

    def split(self, tensor: torch.Tensor) -> DTensor:
        """The part of a whole tensor that belongs here.

        Args:
            tensor: (n, ...), the same on every process.
        """
        return self.join(tensor[list(self.own)])

    def join(self, rows: torch.Tensor) -> DTensor:
        """A split tensor of the rows that each process holds; processes with the same experts get those of the first.

        Args:
            rows: One row for each of `ids`.
        """
        mesh = self.local.mesh
        own = rows.new_zeros(self.size, *rows.shape[1:], device=mesh.device_type)
        own[: len(self.own)] = rows
        if self.local.replicas is not None:
            first = dist.get_process_group_ranks(self.local.replicas)[0]
            dist.broadcast(own, src=first, group=self.local.replicas)
        return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as files hold it, (n, ...); every process must ask.

        Args:
            tensor: A split one, or all of its parts one after the other.
        """
        parts = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return parts[self._places].contiguous()

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Shape of a split tensor in a file."""
        return (len(self._places), *tensor.shape[1:])


@contextmanager
def read_here(bank: nn.Module, rows: SplitRows) -> Iterator[None]:
    """Let a bank of experts read this process's parts of its tensors in the block, in the autograd graph.

    Args:
        bank: A flat module whose parameters are split.
        rows: How.
    """
    split = dict(bank._parameters)
    bank._parameters.update({name: rows.local.read(own) for name, own in split.items() if own is not None})  # type: ignore[misc]
    try:
        yield
    finally:
        bank._parameters.update(split)
