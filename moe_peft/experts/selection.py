"""Which of a backbone's experts a bank's experts go with, and their places among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


class Selection:
    """Some experts of a backbone, numbered in ascending order.

    Args:
        ids: Their ids, ascending.
        num_backbone_experts: Experts that the backbone has there.
    """

    def __init__(self, ids: Sequence[int], num_backbone_experts: int) -> None:
        self.ids = tuple(ids)
        self.num_backbone_experts = num_backbone_experts
        self._tables: dict[torch.device, torch.Tensor] = {}

    def local(self, index_TK: torch.Tensor) -> torch.Tensor:
        """Number the experts in the slots of a routing.

        Args:
            index_TK: (T, K) int64 expert of the backbone in each slot; larger numbers mark a slot without one.

        Returns:
            (T, K) int64 place in the selection, its length where the expert is not selected.
        """
        return self.table(index_TK.device)[index_TK.clamp(max=self.num_backbone_experts)]

    def table(self, device: torch.device) -> torch.Tensor:
        """(E + 1,) int64 place of each expert of the backbone in the selection, its length where it is not selected.

        Args:
            device: Where the table is needed.
        """
        table = self._tables.get(device)
        if table is None:
            table = self._table(device)
            if not torch.compiler.is_compiling():  # a graph that changes its module is compiled a second time
                self._tables[device] = table
        return table

    def keep_on(self, device: torch.device | None) -> None:
        """Keep the table of places on a device alone, so that no compiled graph has to make it; none on meta."""
        self._tables = {}
        if device is not None and device.type != "meta":
            self._tables[device] = self._table(device)

    def _table(self, device: torch.device) -> torch.Tensor:
        table = torch.full((self.num_backbone_experts + 1,), len(self.ids), device=device)
        table[list(self.ids)] = torch.arange(len(self.ids), device=device)
        return table

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __repr__(self) -> str:
        return f"Selection({list(self.ids)} of {self.num_backbone_experts})"
