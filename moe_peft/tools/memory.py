"""Memory that training an adapter takes, estimated without loading the model.

    training = weights + adapter + its gradients + optimizer state + activations

The activations are those that autograd keeps in one forward pass of the adapted model on the meta device, which has
shapes and no memory; with checkpointing the inputs of all layers and what one layer keeps. Not counted: the CUDA
context (0.5 to 1 GB), fragmentation, and the gathered layer of a sharded model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..backbone.structure import find_moe_layers
from ..config.config import MoeConfig
from ..forward.batch import CACHES
from ..quantization.four_bit import four_bit_bytes
from ..quantization.loading import expert_parameters
from ..tables import table

# AdamW keeps two numbers in float32 for each that it trains.
ADAM_BYTES = 8
# What a layer needs while its forward and backward are made again, over what autograd keeps of it.
WORKING = 1.5
# The experts of a backbone on the meta device: the one implementation that loops over no data, and its dtype.
IMPLEMENTATION, ITS_DTYPE = "grouped_mm", torch.bfloat16


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step takes.

    Attributes:
        weights: Of the base model.
        weights_4bit: Of the base model with its linear layers and experts in 4 bits.
        adapter: Of the trained parameters.
        gradients: Of them.
        optimizer: AdamW's state of them.
        activations: That autograd keeps, and the gradient of the logits; None where they cannot be found without data.
        activations_checkpointed: The same with checkpointing.
        file: Size of the saved adapter.
        tokens: Of a batch.
    """

    weights: int
    weights_4bit: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    activations_checkpointed: int | None
    file: int
    tokens: int

    def total(self, *, four_bit: bool = False, checkpointing: bool = False) -> int | None:
        """All of it together.

        Args:
            four_bit: With the base model in 4 bits.
            checkpointing: With the activations of the layers made again in the backward pass.

        Returns:
            Bytes; None where the activations are not known.
        """
        activations = self.activations_checkpointed if checkpointing else self.activations
        if activations is None:
            return None
        weights = self.weights_4bit if four_bit else self.weights
        return weights + self.adapter + self.gradients + self.optimizer + activations

    def __str__(self) -> str:
        """A table of four ways to train."""
        ways = [(four_bit, checkpointing) for four_bit in (False, True) for checkpointing in (False, True)]
        rows: list[list[str]] = [["", *(("4-bit" if b else "16-bit") for b, _ in ways)]]
        rows[0][1:] = [
            f"{title}{', checkpointing' if c else ''}" for title, (_, c) in zip(rows[0][1:], ways, strict=True)
        ]
        rows.append(["weights", *(size_text(self.weights_4bit if b else self.weights) for b, _ in ways)])
        for name, count in (("adapter", self.adapter), ("gradients", self.gradients), ("optimizer", self.optimizer)):
            rows.append([name, *[size_text(count)] * len(ways)])
        activations = [self.activations_checkpointed if c else self.activations for _, c in ways]
        rows.append([f"activations of {self.tokens:,} tokens", *map(size_text, activations)])
        rows.append(["together", *(size_text(self.total(four_bit=b, checkpointing=c)) for b, c in ways)])
        return table(rows)


def training_memory(
    base: nn.Module, config: MoeConfig, *, batch_size: int = 1, length: int = 2048, dtype: torch.dtype | None = None
) -> TrainingMemory:
    """Estimate the memory of a training step.

    Args:
        base: The model on the meta device, see `backbone.without_weights`; it is changed, do not use it afterwards.
        config: The adapter's configuration.
        batch_size: Rows of a batch.
        length: Tokens of a row.
        dtype: Of the weights and of the computation; None takes bfloat16.

    Raises:
        ValueError: A number is not positive, or the configuration does not fit the model.
    """
    for name, value in (("batch_size", batch_size), ("length", length)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"training_memory: {name}={value} must be a whole number of at least 1.")
    dtype = dtype or torch.bfloat16
    count = sum(parameter.numel() for parameter in base.parameters())
    packed = [base.get_parameter(name).numel() for name in _packable(base)]
    in_four = (count - sum(packed)) * dtype.itemsize + sum(four_bit_bytes(numel, True) for numel in packed)
    sparse = bool(find_moe_layers(base))
    base = base.to(ITS_DTYPE if sparse else dtype)
    if sparse:
        base.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]
    with torch.device("meta"):
        model = get_peft_model(base, copy.deepcopy(config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    bytes_of = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    plain, checkpointed = activations(model, batch_size, length, dtype)
    return TrainingMemory(
        weights=count * dtype.itemsize,
        weights_4bit=in_four,
        adapter=bytes_of,
        gradients=bytes_of,
        optimizer=ADAM_BYTES * sum(parameter.numel() for parameter in trained),
        activations=plain,
        activations_checkpointed=checkpointed,
        file=bytes_of,
        tokens=batch_size * length,
    )


def activations(
    model: nn.Module, batch_size: int, length: int, dtype: torch.dtype
) -> tuple[int, int] | tuple[None, None]:
    """Bytes that autograd keeps of one forward pass with a loss, without and with checkpointing.

    Args:
        model: An adapted model on the meta device.
        batch_size: Rows.
        length: Tokens of a row.
        dtype: That the model will compute in, where it is wider than the one it is in here.

    Returns:
        Both; None where the pass depends on values, as that of experts which are copied out of a backbone.
    """
    kept = _Kept(model, dtype)
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    model.train()
    try:
        with kept.watching():
            output = model(input_ids=ids, labels=ids, **{cache_name(model): _NoCache()})
    except (NotImplementedError, RuntimeError):
        return None, None
    logits = output.logits.numel() * torch.float32.itemsize
    outside = kept.bytes_of.pop(None, 0) + logits
    inside = list(kept.bytes_of.values())
    plain = outside + sum(inside)
    inputs = sum(kept.inputs.values())
    return plain, (inputs + max(outside, round(WORKING * max(inside)))) if inside else plain


def cache_name(model: nn.Module) -> str:
    """What a model calls the cache that its forward takes, which transformers 5.24 has renamed.

    Args:
        model: A model of transformers, in a `PeftModel` where it has an adapter.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return next((name for name in CACHES if name in inspect.signature(type(base).forward).parameters), CACHES[-1])


class _NoCache(DynamicCache):
    """Keeps nothing, as training does; without any cache a model looks for packed rows, whose values are not there."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The keys and values of this pass alone."""
        return key_states, value_states


class _Kept:
    """Adds up what autograd keeps, by the layer in whose forward it is made; each storage counts once."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.layers: dict[nn.Module, int] = {
            module: number
            for number, module in enumerate(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
        }
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.seen: dict[int, torch.Tensor] = {}
        self.dtype = dtype
        self.current: int | None = None
        self.bytes_of: dict[int | None, int] = {}
        self.inputs: dict[int, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is kept in the block."""
        handles = []
        for layer in self.layers:
            handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = self.layers[layer]
        hidden = args[0] if args else kwargs.get("hidden_states")
        self.inputs[self.current] = self._size(hidden) if isinstance(hidden, torch.Tensor) else 0

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.current = None

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self.weights and storage not in self.seen:
            self.seen[storage] = tensor  # alive, so that no other storage gets its address
            self.bytes_of[self.current] = self.bytes_of.get(self.current, 0) + self._size(tensor)
        return tensor

    def _size(self, tensor: torch.Tensor) -> int:
        """Bytes of a storage, in the dtype that training will have where this pass is in a narrower one."""
        size = tensor.untyped_storage().nbytes()
        wider = tensor.dtype == ITS_DTYPE and self.dtype.itemsize > ITS_DTYPE.itemsize
        return size * self.dtype.itemsize // ITS_DTYPE.itemsize if wider else size


def _packable(model: nn.Module) -> list[str]:
    """Names of the weights that 4-bit loading packs: linear layers but for the head, and fused experts."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    return [*names, *expert_parameters(model)]


def size_text(size: int | None) -> str:
    """Bytes as a person reads them.

    Args:
        size: Their number; None where it is not known.
    """
    if size is None:
        return "unknown"
    for unit, width in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= width:
            return f"{size / width:,.2f} {unit}"
    return f"{size} B"
