"""Runs a model on a batch, and hands every decision of its routers to an observer.

The routers are those of its adapters, or those of a mixture-of-experts backbone where no adapter routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ...backbone.experts_call import experts_call
from ...backbone.structure import find_moe_layers, unsupported_reason
from ...forward.find import find_trackers
from ...messages import shown
from ...place import MoeLayer
from ...routers import backbone_routing
from ...selection.scoring import model_inputs
from ...types import Routing, TokenContext

BACKBONE = "backbone"  # stands for the name of an adapter where none routes
Batch = Mapping[str, Any]
Observer = Callable[[str, str, Routing], None]


def check_batches(batches: Any) -> None:
    """Refuse what are no groups of batches.

    Args:
        batches: What a user gave.

    Raises:
        ValueError: It is no mapping from names to batches.
    """
    named = isinstance(batches, Mapping) and bool(batches) and all(isinstance(group, str) for group in batches)
    single = named and all(
        isinstance(own, Iterable) and not isinstance(own, (Mapping, str)) for own in batches.values()
    )
    if not single:
        raise ValueError(
            f"batches={shown(batches)} must be a dict from the name of a group to its batches: write "
            "{'all': [{'input_ids': ..., 'attention_mask': ...}, ...]}."
        )


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call an observer with every decision of this thread's forwards.

    Args:
        model: A model with routed adapters, or a mixture of experts.
        observer: Takes place, adapter ("backbone" where none routes) and routing.

    Raises:
        TypeError: The model is no module.
        ValueError: Nothing routes there.
    """
    trackers = find_trackers(model)
    with ExitStack() as stack:
        for tracker in trackers:
            tracker.observers.append(observer)
            stack.callback(tracker.observers.remove, observer)
        if not trackers:
            stack.enter_context(_observing_backbone(model, observer))
        yield


@contextmanager
def _observing_backbone(model: nn.Module, observer: Observer) -> Iterator[None]:
    layers = find_moe_layers(model)
    if not layers:
        reason = unsupported_reason(model) or "it is dense, and has no routed adapter"
        raise ValueError(
            f"{type(model).__name__} has no router to look at: {reason}. Add an adapter with peft.get_peft_model, or "
            "load one with PeftModel.from_pretrained."
        )
    mask: list[torch.Tensor | None] = [None]

    def note_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        own = kwargs.get("attention_mask")
        mask[0] = own if isinstance(own, torch.Tensor) and own.dim() == 2 else None

    def watch(layer: MoeLayer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call = experts_call(args, kwargs)
            valid = None if mask[0] is None else mask[0].reshape(-1).to(call.index.device) != 0
            context = TokenContext(valid=valid if valid is not None and len(valid) == len(call.index) else None)
            observer(layer.experts, BACKBONE, backbone_routing(call.index, call.weights, layer.num_experts, context))

        return hook

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(note_mask, with_kwargs=True).remove)
        for layer in layers:
            handle = model.get_submodule(layer.experts).register_forward_pre_hook(watch(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def run(model: nn.Module, batch: Batch) -> None:
    """Run a model on a batch; columns that it does not take are left out, those of sample groups are not.

    Args:
        model: The model.
        batch: Columns by name; labels are left out, as no loss is needed.

    Raises:
        ValueError: The batch is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"A batch is {shown(batch)}, not a dict of tensors. Write {{'input_ids': ...}}.")
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    inputs = model_inputs(model, batch, device)
    if needs_decoder_input(model) and "decoder_input_ids" not in inputs and "labels" in batch:
        inputs["labels"] = batch["labels"].to(device)
    columns = {column for tracker in find_trackers(model) for column in tracker.group_columns}
    model(**inputs, **{column: batch[column] for column in columns if column in batch})


def needs_decoder_input(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder.

    Args:
        model: The model, wrapped or not.
    """
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def base_model(model: nn.Module) -> nn.Module:
    """The model of transformers inside of peft's, or the model itself.

    Args:
        model: The model, wrapped or not.
    """
    return model.get_base_model() if isinstance(model, PeftModel) else model
