"""The backbone's experts, of which an adapter replaces some by trainable copies (ESFT, arXiv 2407.01906).

    y = sum_k w_k FFN_{i_k}(x),        FFN_i trained where expert i is selected, frozen elsewhere

Computed in two parts: the frozen experts with the weights of selected slots at zero, and the copies on the slots that
use them. So the optimizer, the gradients and the saved file hold the copies alone, and the backbone's experts may be
quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..backbone.expert_tensors import expert_tensors, run_experts
from ..backbone.experts_call import ExpertsCall, experts_call
from ..backbone.local_experts import Compute, local_experts
from ..backbone.split_rows import SplitRows, read_here
from ..backbone.stand_in import stand_in_fault
from ..config.parts import RoutedParts
from ..experts import ExpertSlices
from ..messages import warn
from .selecting_layer import SelectingLayer


class SlicedExperts(SelectingLayer):
    """Wraps a fused experts module."""

    merges = True
    adds_to_output = False

    def make_storage(self) -> None:
        """See `AdapterLayer.make_storage`."""
        super().make_storage()
        # What merging overwrote, by adapter: the experts, and their tensors by name.
        self.originals: dict[str, tuple[list[int], dict[str, torch.Tensor]]] = {}

    def update_layer(self, adapter_name: str, parts: RoutedParts, *, inference_mode: bool = False) -> None:
        """Add an adapter; arguments as in `AdapterLayer.update_layer`."""
        if self.merged:
            warn(f"Adapters are merged into {self.place}, which a new one copies its experts from. Unmerging them.")
            self.unmerge()
            tensors = expert_tensors(self.get_base_layer(), self.num_backbone_experts)
            cast(ExpertSlices, parts.experts).copy_from(tensors, tuple(parts.selection or ()))
        self._check_stand_in()
        super().update_layer(adapter_name, parts, inference_mode=inference_mode)

    def _check_stand_in(self) -> None:
        """Refuse a base layer that copies of its experts do not stand for."""
        experts = self.get_base_layer()
        fault = stand_in_fault(experts, self.num_backbone_experts, self.in_features)
        if fault is not None:
            raise ValueError(
                f"{self.place} ({type(experts).__name__}) {fault}, so copies would not be trained on what the model "
                "computes. Its code is of another kind than this package knows: install the version of transformers "
                "that it was tested with, or a newer peft-moe; or train low-rank experts beside the model's own, "
                "which need no copies (expert_adapter='lora')."
            )

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> torch.Tensor:
        """Apply the experts, selected ones by the active adapters' copies.

        Args:
            *args: (T, D) hidden states, (T, K) expert indices, (T, K) weights, as the backbone passes them.
            adapter_names: Not supported, as the rows of the batch are not known here.
            **kwargs: The same by name.

        Returns:
            (T, O).

        Raises:
            ValueError: Adapters are mixed in a batch, or two active ones select the same expert.
        """
        names = self.acting_names(adapter_names)
        if not names:
            return self.base_layer(*args, **kwargs)
        self._check_disjoint([*self.merged_adapters, *names])
        call = experts_call(args, kwargs)
        self.show(names, call)
        local = local_experts(self.get_base_layer())
        if local is not None:
            with local.changed(partial(self._exchange_here, names, local.num_experts)):
                return self.base_layer(*args, **kwargs)
        places = {name: self.selections[name].local(call.index) for name in names}
        frozen_TK = self._frozen(places, call.weights)
        out_TO = self.base_layer(*_replaced(args, call, frozen_TK), **_replaced_by_name(kwargs, call, frozen_TK))
        compute = partial(self._compute, self.num_backbone_experts)
        for name, local_TK in places.items():
            out_TO = self.experts[name](call.hidden, out_TO, local_TK, call.weights, compute)
        return out_TO

    def _exchange_here(
        self,
        names: list[str],
        num_experts: int,
        own: Compute,
        hidden_ND: torch.Tensor,
        index_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the experts that are here, selected ones by the copies that are."""
        places = {name: self.splits[name].rows_of(index_NK) for name in names}
        out_NO = own(hidden_ND, index_NK, self._frozen(places, weights_NK))
        compute = partial(self._compute, num_experts)
        for name, local_NK in places.items():
            with read_here(self.experts[name], self.splits[name]):
                out_NO = self.experts[name](hidden_ND, out_NO, local_NK, weights_NK, compute)
        return out_NO

    def _frozen(self, places: Mapping[str, torch.Tensor], weights_TK: torch.Tensor) -> torch.Tensor:
        """Weights of the frozen experts: zero where an adapter has a copy."""
        for name, local_TK in places.items():
            weights_TK = weights_TK.masked_fill(local_TK < self.experts[name].num_experts, 0.0)
        return weights_TK

    def rows_here(self, bank: nn.Module, name: str, rows: SplitRows) -> torch.Tensor:
        """Copies of this process's selected experts; see `SelectingLayer.rows_here`."""
        stack: Any = self.get_base_layer().get_parameter(name).detach()
        local: torch.Tensor = stack.to_local()
        if local.shape[0] == rows.local.num_experts:
            return local[list(rows.ids)].clone()
        first = rows.local.rank * rows.local.num_experts  # the processes with the same experts have a part of each
        whole: torch.Tensor = stack.full_tensor()
        return whole[[first + expert for expert in rows.ids]]

    def delta_products(self, adapter_name: str) -> torch.Tensor | None:
        """Inner products of what the copies have changed by; None while they are merged into what they came from."""
        if self.merged_adapters or adapter_name in self.splits:
            return None
        tensors = expert_tensors(self.get_base_layer(), self.num_backbone_experts)
        return self.experts[adapter_name].delta_products(tensors, tuple(self.selections[adapter_name]))

    def _compute(self, num_experts: int, tensors: Mapping[str, torch.Tensor], *call: torch.Tensor) -> torch.Tensor:
        return run_experts(self.get_base_layer(), tensors, num_experts, *call)

    def _check_disjoint(self, names: list[str]) -> None:
        seen: set[int] = set()
        for name in names:
            both = sorted(seen & set(self.selections[name]))
            if both:
                raise ValueError(
                    f"The active or merged adapters {names} both replace the experts {both} of {self.place}. Activate "
                    "one of them with model.set_adapter(name), or call unmerge_adapter first."
                )
            seen.update(self.selections[name])

    def check_merge(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Refuse a merge that `merge` would refuse; see `MergingLayer.check_merge`."""
        names = [name for name in adapter_names if name in self.experts and name not in self.merged_adapters]
        self._check_disjoint([*self.merged_adapters, *names])
        if names and parametrize.is_parametrized(self.get_base_layer()):
            raise ValueError(
                f"The experts of {self.place} are quantized, so trained ones cannot be written into them. Load the "
                "base model in 16 or 32 bit to merge."
            )
        for name in names:
            if safe_merge and not all(torch.isfinite(tensor).all() for tensor in self.experts[name].parameters()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def weight_changes(self, adapter_name: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """The backbone's tensors, with copies in their places; see `MergingLayer.weight_changes`."""
        ids = list(self.selections[adapter_name])
        return {key: partial(_with_rows, ids, own) for key, own in self.experts[adapter_name].named_parameters()}

    def merge_one(self, adapter_name: str) -> None:
        """Write an adapter's copies into the backbone's experts."""
        ids = list(self.selections[adapter_name])
        self.originals[adapter_name] = (ids, self._exchange(ids, dict(self.experts[adapter_name].named_parameters())))

    def unmerge_to(self, adapter_names: Sequence[str]) -> None:
        """Write the backbone's own experts back; see `MergingLayer.unmerge_to`."""
        while len(self.merged_adapters) > len(adapter_names):
            self._exchange(*self.originals.pop(self.merged_adapters.pop()))

    @torch.no_grad()
    def _exchange(self, ids: list[int], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write slices into the backbone's tensors; returns what was there."""
        own = expert_tensors(self.get_base_layer(), self.num_backbone_experts)
        before = {key: own[key][ids] for key in tensors}
        for key, tensor in tensors.items():
            own[key][ids] = tensor.to(own[key])
        return before


@torch.no_grad()
def _with_rows(ids: list[int], rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[ids] = rows.to(tensor)
    return changed


def _replaced(args: tuple, call: ExpertsCall, weights_TK: torch.Tensor) -> tuple:
    return tuple(weights_TK if value is call.weights else value for value in args)


def _replaced_by_name(kwargs: dict[str, Any], call: ExpertsCall, weights_TK: torch.Tensor) -> dict[str, Any]:
    return {name: weights_TK if value is call.weights else value for name, value in kwargs.items()}
