"""A linear layer whose output, or input, is scaled by routed vectors (MoV, arXiv 2309.05444)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from transformers.pytorch_utils import Conv1D

from ..types import TokenContext
from .routed_layer import RoutedLayer


class ScaledLinear(RoutedLayer):
    """Wraps a linear layer; the experts say which side is scaled, what their router reads, and how many heads.

    Attributes:
        originals: Weight, and bias where there is one, from before any merge; empty while nothing is merged.
    """

    originals: tuple[torch.Tensor, ...] = ()

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Scale by the active adapters and apply the base layer.

        Scales of several adapters multiply; each router reads what is scaled as it is without any adapter.

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
        context = self.tracker.tokens(x, self.rows, self.training)
        at_input = [name for name in names if self.experts[name].scales_input]
        out = self.base_layer(self._scale(at_input, x, x, context), *args, **kwargs)
        return self._scale([name for name in names if name not in at_input], out, x, context)

    def _scale(
        self, names: Sequence[str], u: torch.Tensor, hidden: torch.Tensor, context: TokenContext
    ) -> torch.Tensor:
        """Scale u, the layer's input or output, by some adapters; `hidden` is the layer's input."""
        scaled = u
        for name in names:
            bank = self.experts[name]
            read = hidden if bank.router_reads_hidden else u
            routing = self.route(
                name, read.reshape(-1, read.shape[-1] // bank.num_heads), _per_head(context, bank.num_heads)
            )
            scaled = bank(None, scaled.reshape(-1, u.shape[-1]), routing).view(u.shape)
        return scaled

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        self.check_rows(adapter_names, x)
        names = sorted(set(adapter_names) & set(self.experts))
        at_input = [name for name in names if self.experts[name].scales_input]
        out = self.base_layer(self._scale_rows(at_input, x, x, adapter_names), *args, **kwargs)
        return self._scale_rows([name for name in names if name not in at_input], out, x, adapter_names)

    def _scale_rows(
        self, names: Sequence[str], u: torch.Tensor, hidden: torch.Tensor, adapter_names: list[str]
    ) -> torch.Tensor:
        result = u.clone() if names else u
        for name in names:
            rows = [row for row, own in enumerate(adapter_names) if own == name]
            result[rows] = self._scale([name], u[rows], hidden[rows], TokenContext())
        return result

    def is_mergeable(self, adapter_name: str) -> bool:
        """Whether the scale is the same for every input, as it is with a single vector."""
        return self.router[adapter_name].mergeable

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Scale the base weight; exact with a single vector, refused otherwise.

        A quantized weight is quantized again, so the merged layer is exact to that rounding.

        Args:
            safe_merge: Whether to check the merged weight and bias for values that are not finite before they are
                stored.
            adapter_names: Adapters to merge; None merges the active ones.

        Raises:
            ValueError: An adapter depends on its input, or the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.experts]
        for name in names:
            if not self.is_mergeable(name):
                raise ValueError(
                    f"Adapter {name!r} at {self.place} mixes its vectors by the input; it cannot be merged."
                )
        for name in names:
            current = self._weight_and_bias()
            merged = self._scaled(name, current)
            if safe_merge and not all(torch.isfinite(tensor).all() for tensor in merged):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._store(merged)
            self.originals = self.originals or current
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight as it was before the adapters were merged, a quantized one to its rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        # The model may have been moved or cast since.
        self._store([old.to(now) for old, now in zip(self.originals, self._weight_and_bias(), strict=True)])
        self.originals, self.merged_adapters = (), []

    def _weight_and_bias(self) -> tuple[torch.Tensor, ...]:
        bias = getattr(self.get_base_layer(), "bias", None)
        weight = self.get_base_weight().detach()
        return (weight,) if bias is None else (weight, bias.detach())

    def _scaled(self, name: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Weight and bias times the single vector of an adapter, computed in at least float32."""
        bank = self.experts[name]
        weight, *bias = tensors
        vector = bank.vectors[0].to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        over_columns = bank.scales_input != isinstance(self.get_base_layer(), Conv1D)
        scaled_weight = (weight * (vector if over_columns else vector[:, None])).to(weight.dtype)
        return [scaled_weight, *(b if bank.scales_input else (b * vector).to(b.dtype) for b in bias)]

    def _store(self, tensors: Sequence[torch.Tensor]) -> None:
        weight, *bias = tensors
        self.set_base_weight(weight)
        for tensor in bias:
            self.get_base_layer().bias.data = tensor


def _per_head(context: TokenContext, num_heads: int) -> TokenContext:
    """Describe the heads of tokens, the heads of a token together."""
    if num_heads == 1:
        return context
    valid, sequences = (
        None if tensor is None else tensor.repeat_interleave(num_heads)
        for tensor in (context.valid, context.sequences)
    )
    return replace(context, valid=valid, sequences=sequences)
