"""The backbone's experts, of which an adapter replaces some by trainable copies (ESFT, arXiv 2407.01906).

    y = sum_k w_k FFN_{i_k}(x),        FFN_i trained where expert i is selected, frozen elsewhere

Computed in two parts: the frozen experts with the weights of selected slots at zero, and the copies on the slots that
use them. So the optimizer, the gradients and the saved file hold the copies alone, and the backbone's experts may be
quantized.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch.nn.utils import parametrize

from ..backbone import ExpertsCall, experts_call
from ..config import RoutedParts
from ..routers import backbone_routing
from .expert_tensors import expert_tensors, run_experts
from .routed_layer import RoutedLayer


class SlicedExperts(RoutedLayer):
    """Wraps a fused experts module."""

    def update_layer(self, adapter_name: str, parts: RoutedParts, *, inference_mode: bool = False) -> None:
        """Add an adapter; arguments as in `RoutedLayer.update_layer`."""
        self.originals: dict[str, dict[str, torch.Tensor]] = getattr(self, "originals", {})
        super().update_layer(adapter_name, parts, inference_mode=inference_mode)

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
        if adapter_names is not None:
            raise ValueError(
                f"Cannot pass `adapter_names` to {self.place}, which receives flattened tokens: adapters on a "
                "backbone's experts cannot be mixed in a batch. Activate one with model.set_adapter(name)."
            )
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        names = self.active_names()
        if not names:
            return self.base_layer(*args, **kwargs)
        self._check_disjoint(names)
        call = experts_call(args, kwargs)
        context = self.tracker.tokens(call.hidden, in_training=self.training)
        num_experts = self.num_backbone_experts
        for name in names:
            self.note(name, backbone_routing(call.index, call.weights, num_experts, context))
        places = {name: self.local_index(name, call.index) for name in names}
        frozen_TK = call.weights
        for name, local_TK in places.items():
            frozen_TK = frozen_TK.masked_fill(local_TK < len(self.selections[name]), 0.0)
        out_TO = self.base_layer(*_replaced(args, call, frozen_TK), **_replaced_by_name(kwargs, call, frozen_TK))
        for name, local_TK in places.items():
            out_TO = self._add_slices(name, out_TO, call, local_TK)
        return out_TO

    def _add_slices(self, name: str, out_TO: torch.Tensor, call: ExpertsCall, local_TK: torch.Tensor) -> torch.Tensor:
        tensors, base = dict(self.experts[name].named_parameters()), self.get_base_layer()
        hit_TK = local_TK < len(self.selections[name])
        if torch.compiler.is_compiling():
            # Shapes must not depend on the routing: every slot runs, those of other experts with weight zero.
            local_TK, weights_TK = local_TK.masked_fill(~hit_TK, 0), call.weights.masked_fill(~hit_TK, 0.0)
            added_TO = run_experts(base, tensors, self.num_backbone_experts, call.hidden, local_TK, weights_TK)
            return out_TO + added_TO.to(out_TO.dtype)
        rows, slots = hit_TK.nonzero(as_tuple=True)
        if rows.numel() == 0:
            # Every parameter takes part in every step, as data-parallel training expects.
            return out_TO + sum(0.0 * tensor.sum() for tensor in tensors.values()).to(out_TO.dtype)
        local, weights = local_TK[rows, slots][:, None], call.weights[rows, slots][:, None]
        added = run_experts(base, tensors, self.num_backbone_experts, call.hidden[rows], local, weights)
        return out_TO.index_add(0, rows, added.to(out_TO.dtype))

    def _check_disjoint(self, names: list[str]) -> None:
        seen: set[int] = set()
        for name in names:
            both = sorted(seen & set(self.selections[name]))
            if both:
                raise ValueError(
                    f"The active adapters {names} both replace the experts {both} of {self.place}. Activate one of "
                    "them with model.set_adapter(name)."
                )
            seen.update(self.selections[name])

    def is_mergeable(self, adapter_name: str) -> bool:
        """Copies replace what they were copied from, exactly."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the copies into the backbone's experts.

        Args:
            safe_merge: Whether to check the copies for values that are not finite first.
            adapter_names: Adapters to merge; None merges the active ones.

        Raises:
            ValueError: A copy is not finite, two adapters select the same expert, or the backbone's experts are
                quantized.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.experts]
        self._check_disjoint([*self.merged_adapters, *names])
        base = self.get_base_layer()
        if names and parametrize.is_parametrized(base):
            raise ValueError(
                f"The experts of {self.place} are quantized, so trained ones cannot be written into them. Load the "
                "base model in 16 or 32 bit to merge."
            )
        for name in names:
            tensors = dict(self.experts[name].named_parameters())
            if safe_merge and not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        for name in names:
            self.originals[name] = self._exchange(name, dict(self.experts[name].named_parameters()))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Write the backbone's own experts back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._exchange(name, self.originals.pop(name))

    @torch.no_grad()
    def _exchange(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write slices into the backbone's tensors; returns what was there."""
        ids = list(self.selections[name])
        own = expert_tensors(self.get_base_layer(), self.num_backbone_experts)
        before = {key: own[key][ids].clone() for key in tensors}
        for key, tensor in tensors.items():
            own[key][ids] = tensor.to(own[key])
        return before


def _replaced(args: tuple, call: ExpertsCall, weights_TK: torch.Tensor) -> tuple:
    return tuple(weights_TK if value is call.weights else value for value in args)


def _replaced_by_name(kwargs: dict[str, Any], call: ExpertsCall, weights_TK: torch.Tensor) -> dict[str, Any]:
    return {name: weights_TK if value is call.weights else value for name, value in kwargs.items()}
