"""The backbone's experts with a low-rank pair on each matrix of each expert, or of each selected one.

    y = sum_k w_k W2'_{i_k} gate(W1'_{i_k} x),      W' = W + s B A

The experts module itself is called, and runs the pass of `ops.expert_lora` in that call: hooks fire, offloaded and
sharded weights arrive, and 4-bit ones are dequantized expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..backbone.experts_call import ExpertsCall, experts_call
from ..backbone.split_rows import read_here
from ..experts.expert_pairs import MATRICES
from ..ops.expert_lora import expert_lora
from ..ops.expert_stacks import LowRankPairs
from .expert_pass import call_with
from .fused_experts import matrix_names, read_fused
from .selecting_layer import SelectingLayer


class AdaptedExperts(SelectingLayer):
    """Wraps a fused experts module."""

    merges = True
    adds_to_output = False

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> torch.Tensor:
        """Apply the experts with the pairs of the active adapters.

        Args:
            *args: (T, D) hidden states, (T, K) expert indices, (T, K) weights, as the backbone passes them.
            adapter_names: Not supported, as the rows of the batch are not known here.
            **kwargs: The same by name.

        Returns:
            (T, O).

        Raises:
            ValueError: Adapters are mixed in a batch.
        """
        names = self.acting_names(adapter_names)
        if not names:
            return self.base_layer(*args, **kwargs)
        call = experts_call(args, kwargs)
        self.show(names, call)
        compute = partial(self._run, names, self._trains(names, call))
        return call_with(compute, self, self.base_layer, self.get_base_layer(), *args, **kwargs)

    def _trains(self, names: list[str], call: ExpertsCall) -> bool:
        """Whether dropout acts in this call."""
        drops = any(self.experts[name].lora_dropout.p > 0 for name in names)
        return drops and self.tracker.tokens(call.hidden, self.rows, self.training).training

    def _run(self, names: list[str], training: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
        call, experts = experts_call(args, kwargs), self.get_base_layer()
        pairs: dict[str, tuple[LowRankPairs, ...]] = {}
        for name in names:
            for matrix, own in self._pairs(name, call.index.device, training).items():
                key = self._parameter(matrix)
                pairs[key] = (*pairs.get(key, ()), own)
        return expert_lora(read_fused(experts, pairs), call.hidden, call.index, call.weights)

    def _pairs(self, name: str, device: torch.device, training: bool) -> dict[str, LowRankPairs]:
        """The pairs of an adapter, of a split one those of this process's experts."""
        bank, chosen, rows = self.experts[name], self.selections.get(name), self.splits.get(name)
        if rows is not None:
            some = (None, None) if chosen is None else (rows.ids, rows.table(device))
            with read_here(bank, rows):
                here: dict[str, LowRankPairs] = bank(*some, training)
                return here
        whole: dict[str, LowRankPairs] = bank(
            *((None, None) if chosen is None else (chosen.ids, chosen.table(device))), training
        )
        return whole

    def _parameter(self, matrix: str) -> str:
        """Name of the backbone's parameter that holds a matrix."""
        names = matrix_names(self.get_base_layer())
        assert names is not None
        return names[MATRICES.index(matrix)]

    def check_merge(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Refuse a merge that could not be stored; see `MergingLayer.check_merge`."""
        names = [name for name in adapter_names if name in self.experts and name not in self.merged_adapters]
        if names and parametrize.is_parametrized(self.get_base_layer()):
            raise ValueError(
                f"The experts of {self.place} are quantized, so pairs cannot be added to them. Load the base model in "
                "16 or 32 bit to merge, or keep the adapter, which runs on 4-bit experts as it is."
            )
        for name in names if safe_merge else []:
            for matrix in self.experts[name].matrices:
                changed = (self._changed(name, matrix, place, 1.0)[1] for place in range(self._count(name)))
                if not all(bool(torch.isfinite(weight).all()) for weight in changed):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken, at {self.place}."
                    )

    def weight_changes(self, adapter_name: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """The experts' matrices, with an adapter's pairs added; see `MergingLayer.weight_changes`."""
        return {
            self._parameter(m): partial(self._with_pairs, adapter_name, m) for m in self.experts[adapter_name].matrices
        }

    @torch.no_grad()
    def _with_pairs(self, name: str, matrix: str, stack: torch.Tensor) -> torch.Tensor:
        changed = stack.clone()
        for place in range(self._count(name)):
            own = changed[self._id(name, place)]
            own.copy_(self._sum(own, name, matrix, place, 1.0))
        return changed

    def merge_one(self, adapter_name: str) -> None:
        """Add an adapter's pairs to the experts' matrices."""
        self._add(adapter_name, 1.0)

    def unmerge_to(self, adapter_names: Sequence[str]) -> None:
        """Subtract merged adapters from the matrices; see `MergingLayer.unmerge_to`."""
        while len(self.merged_adapters) > len(adapter_names):
            self._add(self.merged_adapters.pop(), -1.0)

    def _add(self, name: str, sign: float) -> None:
        for matrix in self.experts[name].matrices:
            for place in range(self._count(name)):
                own, changed = self._changed(name, matrix, place, sign)
                own.copy_(changed)

    def _count(self, name: str) -> int:
        return self.experts[name].num_experts

    def _id(self, name: str, place: int) -> int:
        """The backbone's expert that a pair goes with."""
        chosen = self.selections.get(name)
        return place if chosen is None else chosen.ids[place]

    @torch.no_grad()
    def _changed(self, name: str, matrix: str, place: int, sign: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's matrix as it is stored, and what it becomes with its pair added or subtracted."""
        weight: nn.Parameter = getattr(self.get_base_layer(), self._parameter(matrix))
        own = weight.data[self._id(name, place)]
        return own, self._sum(own, name, matrix, place, sign)

    def _sum(self, own: torch.Tensor, name: str, matrix: str, place: int, sign: float) -> torch.Tensor:
        """An expert's stored matrix with its pair added or subtracted."""
        delta = self.experts[name].delta(matrix, place).to(own.device)
        delta = delta if getattr(self.get_base_layer(), "is_transposed", False) else delta.T
        dtype = torch.promote_types(own.dtype, delta.dtype)
        return (own.to(dtype) + sign * delta.to(dtype)).to(own.dtype)
