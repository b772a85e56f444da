"""A linear layer whose output, or input, is scaled by routed vectors (MoV, arXiv 2309.05444)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from transformers.pytorch_utils import Conv1D

from ..config import RoutedParts
from ..placement import reads_encoder_states
from ..types import TokenContext
from .routed_layer import RoutedLayer


class ScaledLinear(RoutedLayer):
    """Wraps a linear layer; the experts say which side is scaled, what their router reads, and how many heads."""

    def update_layer(self, adapter_name: str, parts: RoutedParts, *, inference_mode: bool = False) -> None:
        """Add an adapter; arguments as in `RoutedLayer.update_layer`."""
        self.originals: dict[str, tuple[torch.Tensor, ...]] = getattr(self, "originals", {})
        super().update_layer(adapter_name, parts, inference_mode=inference_mode)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Scale by the active adapters and apply the base layer.

        Args:
            x: (..., D) input.
            *args: Passed to the base layer.
            adapter_names: Adapter of each row of the batch, "__base__" for none; None uses the active adapters.
            **kwargs: Passed to the base layer.

        Returns:
            (..., O) in the dtype the base layer returns.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        names = self.active_names()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        return self._apply_adapters(names, x, *args, **kwargs)

    @cached_property
    def from_encoder(self) -> bool:
        """Whether the input holds encoder states."""
        return reads_encoder_states(self.place)

    def _apply_adapters(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        context = self.tracker.tokens(x, self.from_encoder, self.training)
        hidden = x
        for name in names:
            if self.experts[name].scales_input:
                x = self._scale(name, x, hidden, context)
        out = self.base_layer(x, *args, **kwargs)
        for name in names:
            if not self.experts[name].scales_input:
                out = self._scale(name, out, hidden, context)
        return out

    def _scale(self, name: str, u: torch.Tensor, hidden: torch.Tensor, context: TokenContext) -> torch.Tensor:
        bank = self.experts[name]
        read = hidden if bank.router_reads_hidden else u
        read = read.reshape(-1, read.shape[-1] // bank.num_heads)
        routing = self.route(name, read, _per_head(context, bank.num_heads))
        return bank(None, u.reshape(-1, u.shape[-1]), routing).view(u.shape)

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        if len(adapter_names) != x.shape[0]:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {x.shape[0]} respectively at {self.place}. Give one name per row of the batch."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs).clone()
        for name in sorted(set(adapter_names) & set(self.experts)):
            rows = [row for row, own in enumerate(adapter_names) if own == name]
            result[rows] = self._apply_adapters([name], x[rows], *args, **kwargs)
        return result

    def is_mergeable(self, adapter_name: str) -> bool:
        """Whether the scale is the same for every input, as it is with a single vector."""
        return self.router[adapter_name].mergeable

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Scale the base weight; exact with a single vector, refused otherwise.

        Args:
            safe_merge: Whether to check the merged weight for values that are not finite before it is stored.
            adapter_names: Adapters to merge; None merges the active ones.

        Raises:
            ValueError: An adapter depends on its input, or the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.experts]
        for name in names:
            if not self.is_mergeable(name):
                raise ValueError(f"Adapter {name!r} at {self.place} depends on the input; it cannot be merged.")
        for name in names:
            weight, bias = self.get_base_weight(), getattr(self.get_base_layer(), "bias", None)
            scale = self.experts[name].vectors[0].to(torch.promote_types(weight.dtype, torch.float32))
            over_columns = self.experts[name].scales_input != isinstance(self.get_base_layer(), Conv1D)
            merged = weight.to(scale.dtype) * (scale if over_columns else scale[:, None])
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.originals[name] = (weight.clone(),) if bias is None else (weight.clone(), bias.data.clone())
            self.set_base_weight(merged.to(weight.dtype))
            if bias is not None and not self.experts[name].scales_input:
                bias.data = (bias.data.to(scale.dtype) * scale).to(bias.dtype)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the base weight as it was before the adapters were merged."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            weight, *bias = self.originals.pop(self.merged_adapters.pop())
            self.set_base_weight(weight)
            if bias:
                self.get_base_layer().bias.data = bias[0]


def _per_head(context: TokenContext, num_heads: int) -> TokenContext:
    """Describe the heads of tokens, the heads of a token together."""
    if num_heads == 1:
        return context
    valid, sequences = (
        None if tensor is None else tensor.repeat_interleave(num_heads)
        for tensor in (context.valid, context.sequences)
    )
    return replace(context, valid=valid, sequences=sequences)
