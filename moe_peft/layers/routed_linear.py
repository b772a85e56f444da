"""A linear layer with routed adapters: y = base(x) + the routed sum of every active adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .constant_weights import check_constant, check_weight, constant_weights
from .linear_layer import LinearLayer


class RoutedLinear(LinearLayer):
    """Adds a routed sum to what the linear layer gives."""

    def with_adapters(
        self, names: Sequence[str], base: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Add the routed sum of every adapter; see `LinearLayer.with_adapters`."""
        context = self.tracker.tokens(x, self.rows, self.training, self.place)
        x_TD = x.reshape(-1, x.shape[-1])
        out_TO = base(x_TD, *args, **kwargs)
        if self.quantization_backend is not None:
            out_TO = self.quantization_backend.maybe_clone_base_result(out_TO)
        # A plain layer's fresh output may be added to in place; anything else may keep or share its output.
        in_place = type(base) in (nn.Linear, Conv1D) and not base._forward_hooks  # type: ignore[attr-defined]
        for name in names:
            out_TO = self.add(name, x_TD, out_TO, context, in_place=in_place)
        return out_TO.view(*x.shape[:-1], out_TO.shape[-1])

    def with_adapters_of_rows(
        self, adapter_names: list[str], base: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Add to each row the routed sum of its adapter; see `LinearLayer.with_adapters_of_rows`."""
        out = base(x, *args, **kwargs)
        result = out.clone()
        context = self.tracker.tokens(x, self.rows, turned=False)
        for name in sorted(set(adapter_names)):
            if name == "__base__" or name not in self.experts:
                continue
            rows = [row for row, own in enumerate(adapter_names) if own == name]
            part, part_out = x[rows], out[rows]
            added = self.add(
                name, part.reshape(-1, x.shape[-1]), part_out.reshape(-1, out.shape[-1]), context.rows(rows)
            )
            result[rows] = added.view(part_out.shape)
        return result

    def check_merge(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Refuse a merge that could not be stored, or not be exact; see `MergingLayer.check_merge`."""
        check_weight(self.get_base_layer(), self.quantization_backend, self.place)
        for name in adapter_names:
            check_constant(self.router[name], self.in_features, name, self.place)
        if safe_merge and adapter_names:
            merged = self.get_base_weight()
            for name in adapter_names:
                merged = self._merged(merged, name, sign=1.0)
            if not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter_names[-1]} seems to be broken, at "
                    f"{self.place}."
                )

    def merge_one(self, adapter_name: str) -> None:
        """Add an adapter's matrix to the base weight."""
        self.set_base_weight(self._merged(self.get_base_weight(), adapter_name, sign=1.0))

    def unmerge_to(self, adapter_names: Sequence[str]) -> None:
        """Subtract merged adapters from the base weight; see `MergingLayer.unmerge_to`."""
        while len(self.merged_adapters) > len(adapter_names):
            name = self.merged_adapters.pop()
            self.set_base_weight(self._merged(self.get_base_weight(), name, sign=-1.0))

    def weight_changes(self, adapter_name: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """The weight, with an adapter's matrix added; see `MergingLayer.weight_changes`."""
        return {"weight": partial(self._merged, name=adapter_name, sign=1.0)}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a sum of pairs has the same weights for every token; see `MergingLayer.supports_lora_conversion`."""
        return adapter_name in self.experts and self.is_mergeable(adapter_name)

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The low-rank pair that equals a mergeable adapter, with its scale in B.

        Returns:
            A (R, D) and B (O, R), also for a `Conv1D`.
        """
        weights_E = constant_weights(self.router[adapter_name], self.in_features)
        factors: tuple[torch.Tensor, torch.Tensor] = self.experts[adapter_name].delta_factors(weights_E)
        return factors

    def get_mean_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The low-rank pair of one expert's rank that stands for the mean of a mergeable adapter's experts.

        Returns:
            A (R, D) and B (O, R), also for a `Conv1D`.
        """
        weights_E = constant_weights(self.router[adapter_name], self.in_features)
        factors: tuple[torch.Tensor, torch.Tensor] = self.experts[adapter_name].mean_factors(weights_E)
        return factors

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The matrix a mergeable adapter adds to the base weight.

        Returns:
            (O, D), or (D, O) for a `Conv1D`: the layout of the base weight.
        """
        weights_E = constant_weights(self.router[adapter_name], self.in_features)
        delta_OD = self.experts[adapter_name].delta_weight(weights_E)
        return delta_OD.T if isinstance(self.get_base_layer(), Conv1D) else delta_OD

    @torch.no_grad()
    def _merged(self, weight: torch.Tensor, name: str, *, sign: float) -> torch.Tensor:
        """A base weight with an adapter's matrix added, or subtracted, in the dtype of the weight."""
        delta = self.get_delta_weight(name).to(weight.device)
        return (weight.to(delta.dtype) + sign * delta).to(weight.dtype)
