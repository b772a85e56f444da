"""A linear layer whose output, or input, is scaled by routed vectors (MoV, arXiv 2309.05444)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..types import TokenContext
from .constant_weights import check_constant, check_weight, constant_weights
from .linear_layer import LinearLayer


class ScaledLinear(LinearLayer):
    """Wraps a linear layer; the experts say which side is scaled, what their router reads, and how many heads.

    Attributes:
        originals: Weight, and bias where there is one, from before any merge; empty while nothing is merged.
    """

    adds_to_output = False
    originals: tuple[torch.Tensor, ...] = ()

    def with_adapters(
        self, names: Sequence[str], base: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Scale by the adapters; see `LinearLayer.with_adapters`.

        Scales of several adapters multiply; each router reads what is scaled as it is without any adapter.
        """
        context = self.tracker.tokens(x, self.rows, self.training, self.place)
        at_input: list[str] = []
        at_output: list[str] = []
        for name in names:
            _, bank = self.parts_of(name)
            (at_input if bank.scales_input else at_output).append(name)
        scaled_x = self._scale(at_input, x, x, context) if at_input else x
        out = base(scaled_x, *args, **kwargs)
        read = self._unscaled(out, scaled_x) if at_output and self.merged_adapters else None
        return self._scale(at_output, out, x, context, read) if at_output else out

    def _unscaled(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the routers of adapters that are not merged read: an output that no merged adapter has scaled."""
        at_input = [name for name in self.merged_adapters if self.experts[name].scales_input]
        if len(at_input) == len(self.merged_adapters):
            return out
        for name in at_input:
            x = x * self._vector(name).to(x)
        weight, *bias = (tensor.to(x) for tensor in self.originals)
        weight = weight.T if isinstance(self.get_base_layer(), Conv1D) else weight
        return nn.functional.linear(x, weight, *bias)

    def _scale(
        self,
        names: Sequence[str],
        u: torch.Tensor,
        hidden: torch.Tensor,
        context: TokenContext,
        read_by_routers: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scale u, the layer's input or output, by some adapters; `hidden` is the layer's input."""
        scaled = u
        for name in names:
            router, bank = self.parts_of(name)
            assert router is not None, "vectors have no decision but that of a router of their own"
            read = hidden if bank.router_reads_hidden else u if read_by_routers is None else read_by_routers
            scaled_TO = scaled.reshape(-1, u.shape[-1])
            if bank.num_heads == 1:
                read_XD, per_head = scaled_TO if read is scaled else read.reshape(-1, read.shape[-1]), context
            else:
                read_XD = read.reshape(-1, read.shape[-1] // bank.num_heads)
                per_head = _per_head(context, bank.num_heads)
            gates_XE = self.unseen_gates(router, bank, read_XD, per_head)
            if gates_XE is None:
                scaled_TO = bank(None, scaled_TO, self.note(name, router(read_XD, per_head)))
            else:
                scaled_TO = bank.add_gated(read_XD, scaled_TO, gates_XE, per_head)
            scaled = scaled_TO.view(u.shape)
        return scaled

    def with_adapters_of_rows(
        self, adapter_names: list[str], base: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Scale each row by its adapter; see `LinearLayer.with_adapters_of_rows`."""
        names = sorted(set(adapter_names) & set(self.experts))
        at_input = [name for name in names if self.experts[name].scales_input]
        out = base(self._scale_rows(at_input, x, x, adapter_names), *args, **kwargs)
        return self._scale_rows([name for name in names if name not in at_input], out, x, adapter_names)

    def _scale_rows(
        self, names: Sequence[str], u: torch.Tensor, hidden: torch.Tensor, adapter_names: list[str]
    ) -> torch.Tensor:
        result, context = u.clone() if names else u, self.tracker.tokens(hidden, self.rows, turned=False)
        for name in names:
            rows = [row for row, own in enumerate(adapter_names) if own == name]
            result[rows] = self._scale([name], u[rows], hidden[rows], context.rows(rows))
        return result

    def check_merge(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Refuse a merge that could not be stored, or not be exact; see `MergingLayer.check_merge`."""
        check_weight(self.get_base_layer(), self.quantization_backend, self.place)
        for name in adapter_names:
            check_constant(self.router[name], self._router_width(name), name, self.place)
        if safe_merge and adapter_names:
            merged: Sequence[torch.Tensor] = self._weight_and_bias()
            for name in adapter_names:
                merged = self._scaled(name, merged)
            if not all(torch.isfinite(tensor).all() for tensor in merged):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter_names[-1]} seems to be broken, at "
                    f"{self.place}."
                )

    def weight_changes(self, adapter_name: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Weight and bias, scaled by an adapter; see `MergingLayer.weight_changes`."""
        has_bias = getattr(self.get_base_layer(), "bias", None) is not None
        changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "weight": lambda weight: self._scaled_weight(adapter_name, weight)
        }
        return {**changes, "bias": lambda bias: self._scaled_bias(adapter_name, bias)} if has_bias else changes

    def merge_one(self, adapter_name: str) -> None:
        """Scale the base weight by an adapter; a quantized one is quantized again, so it is exact to that rounding."""
        current = self._weight_and_bias()
        self._store(self._scaled(adapter_name, current))
        self.originals = self.originals or current

    @torch.no_grad()
    def unmerge_to(self, adapter_names: Sequence[str]) -> None:
        """Restore the base weight as it was before any merge; see `MergingLayer.unmerge_to`.

        A quantized one is restored to its rounding.
        """
        if list(adapter_names) == self.merged_adapters:
            return
        # The model may have been moved or cast since.
        self._store([old.to(now) for old, now in zip(self.originals, self._weight_and_bias(), strict=True)])
        self.originals, self.merged_adapters = (), []
        for name in adapter_names:
            self.merge_one(name)
            self.merged_adapters.append(name)

    def _router_width(self, adapter_name: str) -> int:
        """Width of what an adapter's router reads."""
        bank = self.experts[adapter_name]
        width = self.in_features if bank.router_reads_hidden else int(bank.vectors.shape[1])
        return width // bank.num_heads

    def _weight_and_bias(self) -> tuple[torch.Tensor, ...]:
        bias = getattr(self.get_base_layer(), "bias", None)
        weight = self.get_base_weight().detach()
        return (weight,) if bias is None else (weight, bias.detach())

    @torch.no_grad()
    def _vector(self, name: str) -> torch.Tensor:
        """(O,) scale of an adapter whose router gives every input the same weights, in at least float32."""
        bank = self.experts[name]
        vectors = bank.vectors.to(torch.promote_types(bank.vectors.dtype, torch.float32))
        weights_E = constant_weights(self.router[name], self._router_width(name)).to(vectors)
        # One vector of weight one is taken as it is: (v - 1) + 1 would round it.
        if len(weights_E) == 1 and weights_E[0] == 1:
            return vectors[0]
        return 1 + weights_E @ (vectors - 1)

    def _scaled(self, name: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Weight and bias times the scale of an adapter, computed in at least float32."""
        weight, *bias = tensors
        return [self._scaled_weight(name, weight), *(self._scaled_bias(name, b) for b in bias)]

    @torch.no_grad()
    def _scaled_weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        vector = self._vector(name).to(weight.device)
        over_columns = self.experts[name].scales_input != isinstance(self.get_base_layer(), Conv1D)
        return (weight * (vector if over_columns else vector[:, None])).to(weight.dtype)

    @torch.no_grad()
    def _scaled_bias(self, name: str, bias: torch.Tensor) -> torch.Tensor:
        return bias if self.experts[name].scales_input else (bias * self._vector(name).to(bias.device)).to(bias.dtype)

    def _store(self, tensors: Sequence[torch.Tensor]) -> None:
        weight, *bias = tensors
        self.set_base_weight(weight)
        for tensor in bias:
            self.get_base_layer().bias.data = tensor


def _per_head(context: TokenContext, num_heads: int) -> TokenContext:
    """Describe the heads of tokens, the heads of a token together."""
    own = (context.valid, context.sequences, context.token_ids, context.prompt)
    if all(tensor is None for tensor in own):
        return context
    valid, sequences, token_ids, prompt = (
        None if tensor is None else tensor.repeat_interleave(num_heads) for tensor in own
    )
    return replace(context, valid=valid, sequences=sequences, token_ids=token_ids, prompt=prompt)
