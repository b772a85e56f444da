"""What a model's forward pass knows besides x: gradient mode, padding, packed documents, sample groups.

Hooks on the Hugging Face model and on its backbone (encoder and decoder where there are two) open and close a
`ForwardPass`; the routed layers ask the tracker for it. Layers never look at `self.training` (generation inside a
training loop runs in train mode) nor at `torch.is_grad_enabled()` (the first pass of reentrant checkpointing runs
without gradient). In a recomputation, which runs inside the backward pass, the original forward's context serves: the
autograd node that made a stack's output says whose backward pass has begun.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from .batch import (
    batch_shape,
    check_groups,
    groups_per_sequence,
    named_inputs,
    number_segments,
    segments_of,
    two_dimensional,
)
from .types import LossScale, MoePeftWarning, Routing, TokenContext

TRACKER_ATTRIBUTE = "_moe_peft_tracker"
HANDLES_ATTRIBUTE = "_moe_peft_handles"
INFERENCE = TokenContext()

Observer = Callable[[str, str, Routing], None]


@dataclass
class LayerLosses:
    """The router losses of one layer in one pass: unscaled 0-d float32 values, and their coefficients."""

    values: dict[str, torch.Tensor]
    coefficients: dict[str, float]


@dataclass
class ForwardLosses:
    """The router losses of one forward of the whole model, encoder and decoder together.

    Attributes:
        scale: Weight of their injected gradient.
        layers: What each (place, adapter) contributed, in order.
    """

    scale: LossScale
    layers: dict[tuple[str, str], list[LayerLosses]] = field(default_factory=dict)


@dataclass
class ForwardPass:
    """One call of a backbone stack.

    Attributes:
        training: Whether the stack was in train mode with gradients enabled.
        shape: (B, L) of the stack's input, or None when unknown.
        attention_mask: (B, L) mask of the stack's own tokens, or longer when earlier tokens are cached.
        encoder_attention_mask: (B, L') mask of the encoder states a decoder attends to.
        segments: (B, L) document index of each token of packed rows.
        groups: (B,) or (S,) group per sequence, or (B, L) group per token.
        contexts: Token contexts made so far.
    """

    training: bool
    losses: ForwardLosses
    shape: tuple[int, int] | None = None
    attention_mask: torch.Tensor | None = None
    encoder_attention_mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    contexts: dict[tuple, TokenContext] = field(default_factory=dict)

    def tokens(self, leading: tuple[int, ...], device: torch.device, from_encoder: bool = False) -> TokenContext:
        """Describe the tokens of an input with the given leading shape.

        Args:
            leading: Shape of the input without its last dimension: (B, L), (T,) for flattened rows, or any other.
            device: Device of the input.
            from_encoder: Whether the input holds encoder states (keys and values of cross-attention).

        Returns:
            The context of the T = prod(leading) tokens, cached for the pass.
        """
        key = (leading, device, from_encoder)
        if key not in self.contexts:
            self.contexts[key] = self._describe(leading, device, from_encoder)
        return self.contexts[key]

    def _describe(self, leading: tuple[int, ...], device: torch.device, from_encoder: bool) -> TokenContext:
        mask = self.encoder_attention_mask if from_encoder else self.attention_mask
        rows = leading
        if len(leading) == 1 and self.shape is not None and leading[0] == self.shape[0] * self.shape[1]:
            rows = self.shape
        valid_T = None
        if mask is not None and len(rows) == 2 and mask.shape[0] == rows[0] and mask.shape[1] >= rows[1]:
            valid_T = mask[:, mask.shape[1] - rows[1] :].reshape(-1).to(device).bool()
        if self.segments is not None and not from_encoder and tuple(self.segments.shape) == rows:
            sequences_T, num_sequences = number_segments(self.segments.to(device))
        elif len(rows) >= 2:
            sequences_T = torch.arange(rows[0], device=device).repeat_interleave(torch.Size(rows[1:]).numel())
            num_sequences = rows[0]
        elif self.shape is not None and rows == self.shape[:1]:
            # One vector per row, as a pooled token.
            sequences_T, num_sequences = torch.arange(rows[0], device=device), rows[0]
        else:
            sequences_T, num_sequences = None, 1
        groups = None if self.groups is None else self.groups.to(device)
        return TokenContext(
            training=self.training,
            valid=valid_T,
            sequences=sequences_T,
            num_sequences=num_sequences,
            groups=groups_per_sequence(groups, sequences_T, num_sequences, rows),
            loss_scale=self.losses.scale if self.training else None,
        )


class ForwardTracker:
    """Opens and closes the forward passes of one model, for all routed layers of all its adapters.

    Attributes:
        current: The pass that is running, or None.
        latest: Losses of the latest gradient-enabled forward, or None.
        in_reverse: The pass whose backward pass runs or ran last, which recomputations repeat; or None.
        loss_scale: Weight of the router losses in passes to come.
        group_columns: Allowed group values by the name of the batch column that carries them.
        observers: Called with (place, adapter, routing) for every routing of a forward pass.
    """

    def __init__(self) -> None:
        self.current: ForwardPass | None = None
        self.latest: ForwardLosses | None = None
        self.in_reverse: ForwardPass | None = None
        self.loss_scale = 1.0
        self.group_columns: dict[str, frozenset[int]] = {}
        self.observers: list[Observer] = []
        self._open_losses: ForwardLosses | None = None
        self._groups: torch.Tensor | None = None
        self._groups_checked = False
        self._warned_outside = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tensors of past passes out of copies and pickles."""
        return {
            **self.__dict__,
            "current": None,
            "latest": None,
            "in_reverse": None,
            "observers": [],
            "_open_losses": None,
            "_groups": None,
        }

    def attach(self, model: nn.Module) -> None:
        """Hook the model (sample groups) and each stack of it (mask, packing, gradient mode)."""
        handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)]
        for stack in find_stacks(model):
            handles.append(stack.register_forward_pre_hook(self._open, with_kwargs=True))
            handles.append(stack.register_forward_hook(self._close, always_call=True))
        handles.append(model.register_forward_hook(self._end, always_call=True))
        setattr(model, TRACKER_ATTRIBUTE, self)
        # On the model, as layers hold the tracker and a copy of a layer alone has no hooks to remove.
        setattr(model, HANDLES_ATTRIBUTE, handles)

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""
        for handle in model.__dict__.pop(HANDLES_ATTRIBUTE, []):
            handle.remove()
        model.__dict__.pop(TRACKER_ATTRIBUTE, None)

    def tokens(self, x: torch.Tensor, from_encoder: bool = False, in_training: bool = False) -> TokenContext:
        """Describe the tokens of a layer's input.

        Args:
            x: (..., D) input.
            from_encoder: Whether x holds encoder states.
            in_training: Whether the layer is in train mode, which outside a forward of the model is worth a warning.
        """
        recomputing = in_backward()
        forward_pass = self.in_reverse if recomputing else self.current
        if forward_pass is None and in_training and not recomputing and torch.is_grad_enabled():
            self._warn_outside()
        if forward_pass is None or not (forward_pass.training or self.observers):
            return INFERENCE
        return forward_pass.tokens(tuple(x.shape[:-1]), x.device, from_encoder)

    def record(self, place: str, adapter: str, routing: Routing, losses: LayerLosses | None) -> None:
        """Keep what a layer decided, once per forward pass and never in a recomputation."""
        if in_backward():
            return
        if self.current is not None and losses is not None:
            self.current.losses.layers.setdefault((place, adapter), []).append(losses)
        for observer in self.observers:
            observer(place, adapter, routing)

    def _warn_outside(self) -> None:
        if self._warned_outside:
            return
        self._warned_outside = True
        warnings.warn(
            "A routed layer in train mode ran outside a forward of its model: router losses, dropout and capacity "
            "are off there. Call the model itself, as in model(**batch), not its forward method nor a part of it.",
            MoePeftWarning,
            stacklevel=4,
        )

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Start a forward of the whole model: take the sample groups out of its arguments."""
        self._open_losses = ForwardLosses(LossScale(self.loss_scale))
        for column, allowed in self.group_columns.items():
            groups = kwargs.pop(column, None)
            if groups is None:
                continue
            groups = torch.as_tensor(groups)
            if groups.device.type == "cpu" or not self._groups_checked:
                check_groups(groups, column, allowed)
                self._groups_checked = True
            self._groups = groups.long()
        return args, kwargs

    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._open_losses = None
        self._groups = None

    def _open(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = named_inputs(stack, args, kwargs)
        self.current = ForwardPass(
            training=stack.training and torch.is_grad_enabled(),
            losses=self._open_losses or ForwardLosses(LossScale(self.loss_scale)),
            shape=batch_shape(inputs),
            attention_mask=two_dimensional(inputs.get("attention_mask")),
            encoder_attention_mask=two_dimensional(inputs.get("encoder_attention_mask")),
            segments=segments_of(inputs),
            groups=self._groups,
        )
        if self.current.training:
            self.latest = self.current.losses

    def _close(self, stack: nn.Module, args: tuple, output: Any) -> None:
        if self.current is not None and self.current.training and not torch.compiler.is_compiling():
            for node in _nodes(output):
                node.register_prehook(partial(self._reverse, self.current))
        self.current = None

    def _reverse(self, forward_pass: ForwardPass, grads: tuple) -> None:
        self.in_reverse = forward_pass


def find_tracker(model: nn.Module) -> ForwardTracker | None:
    """The tracker of a model with routed adapters, wherever in the tree it hangs; None when there is none."""
    for module in model.modules():
        tracker = module.__dict__.get(TRACKER_ATTRIBUTE)
        if tracker is not None:
            return tracker
    return None


def find_stacks(model: nn.Module) -> list[nn.Module]:
    """The modules whose call is one pass over a batch: encoder and decoder, the backbone, or the model itself."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_encoder_decoder and hasattr(model, "get_encoder") and hasattr(model, "get_decoder"):
        stacks = [cast(Any, model).get_encoder(), cast(Any, model).get_decoder()]
        if all(isinstance(stack, nn.Module) and stack is not model for stack in stacks):
            return stacks
    backbone = getattr(model, "base_model", model)
    return [backbone if isinstance(backbone, nn.Module) else model]


def in_backward() -> bool:
    """Whether the caller runs inside a backward pass, as recomputations of gradient checkpointing do."""
    return torch._C._current_graph_task_id() != -1


def _nodes(output: Any) -> Iterator[Any]:
    """Autograd nodes that made the tensors of a module's output, however it nests them."""
    if isinstance(output, torch.Tensor):
        if output.grad_fn is not None:
            yield output.grad_fn
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _nodes(part)
