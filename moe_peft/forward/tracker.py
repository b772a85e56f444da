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
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..types import LossScale, MoePeftWarning, Routing, Rows, TokenContext
from .batch import batch_shape, check_groups, named_inputs, segments_of, two_dimensional
from .forward_pass import ForwardPass
from .joined_losses import ForwardLosses, LayerLosses, WindowSums, finish

TRACKER_ATTRIBUTE = "_moe_peft_tracker"
HANDLES_ATTRIBUTE = "_moe_peft_handles"
INFERENCE = TokenContext()

OUTSIDE = (
    "A routed layer in train mode ran outside a forward of its model: router losses, dropout and capacity are off "
    "there. Call the model itself, as in model(**batch), not its forward method nor a part of it."
)
ACCUMULATION = (
    "The gradients of several forwards add up before an optimizer step, and each adds its router losses with weight "
    "one. In a trainer, call moe_peft.attach(trainer). In a loop over n micro-batches, call "
    "((loss + moe_peft.router_loss(model)) / n).backward()."
)
NO_WINDOW = (
    "load_balancing_scope='accumulation_window' needs to know where a window begins, which moe_peft.attach(trainer) "
    "tells. Without it the balance is measured as with 'global_batch'."
)

Observer = Callable[[str, str, Routing], None]


class ForwardTracker:
    """Opens and closes the forward passes of one model, for all routed layers of all its adapters.

    Attributes:
        current: The pass that is running, or None.
        latest: Losses of the latest gradient-enabled forward, or None.
        in_reverse: The pass whose backward pass runs or ran last, which recomputations repeat; or None.
        loss_scale: Weight of the router losses in passes to come.
        window: Sums of the accumulation window so far, set by the trainer's callback; None in a plain loop.
        managed: Whether a trainer's callback keeps `loss_scale` and `window`.
        group_columns: Allowed group values by the name of the batch column that carries them.
        observers: Called with (place, adapter, routing) for every routing of a forward pass.
        training_observers: Called likewise, for training passes alone.
    """

    def __init__(self) -> None:
        self.current: ForwardPass | None = None
        self.latest: ForwardLosses | None = None
        self.in_reverse: ForwardPass | None = None
        self.loss_scale = 1.0
        self.window: WindowSums | None = None
        self.managed = False
        self.group_columns: dict[str, frozenset[int]] = {}
        self.observers: list[Observer] = []
        self.training_observers: list[Observer] = []
        self._open_losses: ForwardLosses | None = None
        self._groups: torch.Tensor | None = None
        self._groups_checked = False
        self._last_parameter: tuple[int, int] | None = None
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tensors of past passes out of copies and pickles."""
        return {
            **self.__dict__,
            "current": None,
            "latest": None,
            "in_reverse": None,
            "window": None,
            "observers": [],
            "training_observers": [],
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

    def tokens(self, x: torch.Tensor, rows: Rows = "tokens", in_training: bool = False) -> TokenContext:
        """Describe the tokens of a layer's input.

        Args:
            x: (..., D) input.
            rows: What the rows of x are.
            in_training: Whether the layer is in train mode, which outside a forward of the model is worth a warning.
        """
        recomputing = self._recomputing()
        forward_pass = self.in_reverse if recomputing else self.current
        if forward_pass is None and in_training and not recomputing and torch.is_grad_enabled():
            self._warn_once(OUTSIDE)
        if forward_pass is None or not (forward_pass.training or self.observers):
            return INFERENCE
        return forward_pass.tokens(tuple(x.shape[:-1]), x.device, rows)

    def enter(self, place: str, adapter: str, measured: LayerLosses) -> LayerLosses:
        """Keep the router losses of a layer in a training pass.

        Args:
            place: Name of the layer.
            adapter: Name of the adapter.
            measured: What the layer measured.

        Returns:
            The same; in a recomputation what the layer measured in the pass that is repeated, whose sums have been
            joined.
        """
        if not self._recomputing():
            assert self.current is not None
            self.current.layers.setdefault((place, adapter), []).append(measured)
            self.current.losses.layers.setdefault((place, adapter), []).append(measured)
            return measured
        repeated = self.in_reverse.layers.get((place, adapter), []) if self.in_reverse is not None else []
        if not repeated:
            finish({(place, adapter, 0): measured}, None)
            return measured
        if len(repeated) == 1:
            return repeated[0]
        # One module at several depths: the calls are repeated in reverse order, and told apart by what they measured.
        return min(
            repeated, key=lambda made: sum(float((made.own[n] - s).abs().sum()) for n, s in measured.own.items())
        )

    def record(self, place: str, adapter: str, routing: Routing) -> None:
        """Show what a layer decided to the observers, once per forward pass and never in a recomputation."""
        if self._recomputing():
            return
        observers = [*self.observers, *self.training_observers] if routing.context.training else self.observers
        for observer in observers:
            observer(place, adapter, routing)

    def _recomputing(self) -> bool:
        """Whether a layer runs again inside the backward pass, as gradient checkpointing has it do.

        Compiled code cannot ask autograd. It is compiled again where no forward is open, as none is in a backward.
        """
        if torch.compiler.is_compiling():
            return self.current is None and self.in_reverse is not None
        return in_backward()

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, MoePeftWarning, stacklevel=5)

    def _warn_accumulation(self, model: nn.Module) -> None:
        """Warn where a plain loop adds up gradients of several forwards without weighing the router losses."""
        if self.managed or ACCUMULATION in self._warned:
            return
        parameter = next((p for n, p in model.named_parameters() if p.requires_grad and "_router." in n), None)
        if parameter is None:
            return
        seen = (id(parameter), parameter._version)
        unweighed = self.latest is not None and self.latest.scale.injected > 0 and not self.latest.scale.replaced
        if unweighed and self.loss_scale == 1.0 and parameter.grad is not None and seen == self._last_parameter:
            self._warn_once(ACCUMULATION)
        self._last_parameter = seen

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Start a forward of the whole model: take the sample groups out of its arguments."""
        self._open_losses = ForwardLosses(LossScale(self.loss_scale))
        if model.training and torch.is_grad_enabled():
            self._warn_accumulation(model)
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
            # ERNIE 4.5 VL has a block for each modality.
            modalities=two_dimensional(inputs.get("moe_mm_token_type_ids")),
            groups=self._groups,
        )
        if self.current.training:
            self.latest = self.current.losses

    def _close(self, stack: nn.Module, args: tuple, output: Any) -> None:
        if self.current is not None and self.current.training:
            if self.current.layers:
                self._finish(self.current)
            if not torch.compiler.is_compiling():
                for node in _nodes(output):
                    node.register_prehook(partial(self._reverse, self.current))
        self.current = None

    @torch.compiler.disable
    def _finish(self, forward_pass: ForwardPass) -> None:
        layers = {(*key, call): layer for key, made in forward_pass.layers.items() for call, layer in enumerate(made)}
        if self.window is None and any(layer.scope == "accumulation_window" for layer in layers.values()):
            self._warn_once(NO_WINDOW)
        finish(layers, self.window)

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
