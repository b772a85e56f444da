"""What tools ask of their arguments before they start: a model of peft, numbers in range, tensors that are finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..config.adapter_files import is_finite
from ..layers import routed_layers
from ..messages import shown


def check_peft_model(model: Any, caller: str) -> None:
    """Refuse what is no model with adapters.

    Args:
        model: What a user gave.
        caller: For the message.

    Raises:
        TypeError: It is no `PeftModel`.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"{caller}: model={shown(model)} is no PeftModel. Give what peft.get_peft_model or "
            "PeftModel.from_pretrained returns."
        )


def check_module(model: Any, caller: str, name: str = "model") -> None:
    """Refuse what is no model.

    Args:
        model: What a user gave.
        caller: For the message.
        name: Of the argument.

    Raises:
        TypeError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: {name}={shown(model)} is no model. Give a torch.nn.Module, as of transformers.")


def check_text(value: Any, caller: str, name: str) -> None:
    """Refuse what is no name of something.

    Args:
        value: What a user gave.
        caller: For the message.
        name: Of the argument.

    Raises:
        TypeError: It is no text, or empty.
    """
    if not isinstance(value, str) or not value:
        raise TypeError(f"{caller}: {name}={shown(value)} must be a text that is not empty.")


def check_whole(value: Any, caller: str, name: str, least: int = 0) -> None:
    """Refuse what is no whole number of a range; truth values are none.

    Args:
        value: What a user gave.
        caller: For the message.
        name: Of the argument.
        least: The smallest that will do.

    Raises:
        ValueError: It is none, or smaller.
    """
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{caller}: {name}={shown(value)} must be a whole number, {least} or more.")


def listed_batches(batches: Any, caller: str) -> list[Mapping[str, Any]]:
    """Batches of whatever a model takes, as a list, so that each can be read more than once.

    Args:
        batches: Any iterable of keyword arguments of a model.
        caller: For the message.

    Raises:
        ValueError: There is none, or one is no dict.
    """
    alone = isinstance(batches, (str, Mapping)) or not isinstance(batches, Iterable)
    found = [] if alone else list(batches)
    if not found and not alone:
        raise ValueError(f"{caller}: batches is empty: there is no batch. Give texts as dicts of tensors.")
    if not all(isinstance(own, Mapping) and own for own in found) or alone:
        raise ValueError(
            f"{caller}: batches={shown(batches if alone else found)} must be a list of one or more dicts of tensors, "
            "as [{'input_ids': ..., 'attention_mask': ...}]."
        )
    return found


def is_real(value: Any, least: float, most: float) -> bool:
    """Whether a value is a number from `least` to `most`; truth values, NaN and texts are none."""
    return type(value) in (int, float) and least <= value <= most


def check_finite_adapter(model: nn.Module, adapter_name: str, caller: str) -> None:
    """Refuse an adapter with numbers that no result can be read from; tensors without memory are passed over.

    Args:
        model: A model with the adapter.
        adapter_name: Which adapter.
        caller: For the message.

    Raises:
        ValueError: A tensor of it holds NaN or infinite values; all that do are named.
    """
    broken = [name for name, own in _tensors(model, adapter_name) if not own.is_meta and not is_finite(own.detach())]
    if broken:
        raise ValueError(
            f"{caller}: the adapter {shown(adapter_name)} holds NaN or infinite values in {len(broken)} tensors: "
            f"{shown(broken)}. Load it from an earlier checkpoint. Nothing has been changed."
        )


def check_finite(tensor: torch.Tensor, what: str, remedy: str) -> None:
    """Refuse measured numbers of which a comparison would say anything.

    Args:
        tensor: The numbers.
        what: What they are, as the subject of the message.
        remedy: What to do, a sentence.

    Raises:
        ValueError: One is NaN or infinite.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} are not finite (NaN or infinite). {remedy}")


def _tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
    for layer in routed_layers(model):
        for kind, bank in (("experts", layer.experts), ("router", layer.router)):
            if adapter_name in bank:
                for name, parameter in bank[adapter_name].named_parameters():
                    yield f"{layer.place}.{kind}.{name}", parameter
