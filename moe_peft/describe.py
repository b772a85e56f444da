"""Dry run: which layers a configuration matches, and how many parameters it would train."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from .backbone.partitioned import shape_of
from .backbone.probe import called_modules
from .backbone.sizes import num_base_weights
from .config.config import MoeConfig
from .config.fitting_parts import check_fit
from .config.parts import RoutedParts
from .experts import Experts
from .messages import shown
from .part import ModulePart
from .place import Place
from .places.hidden import choose_places
from .tables import table

# Tokens of a training batch, and of one step of decoding.
TOKENS = (2048, 1)


@dataclass(frozen=True)
class Description:
    """What a configuration would do to a model.

    Attributes:
        config: A copy of the configuration with its places resolved.
        places: The layers it matches, in the model's order.
        parameters: Trainable parameters at each of them.
        base_parameters: Parameters of the model without adapters.
        implementations: How the routed sums are computed, by number of tokens: those of a batch, and one that is
            decoded. Empty for kinds of experts that know one way.
        uncalled: Places that a forward pass on the given inputs did not call, where an adapter learns nothing from
            them; None where no inputs were given.
    """

    config: MoeConfig
    places: list[Place]
    parameters: list[int]
    base_parameters: int
    implementations: dict[int, list[str]] = field(default_factory=dict)
    uncalled: list[str] | None = None

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the adapter at all places."""
        return sum(self.parameters)

    def __str__(self) -> str:
        """One line per place, with its sizes where layers differ in them, then the total."""
        config = self.config
        rows = [("place", "layer", "in -> out", "trainable", *self._sizes("sizes"))]
        for place, count in zip(self.places, self.parameters, strict=True):
            sizes = ", ".join(f"{name}={value}" for name, value in config.sizes_at(place).items())
            width = f"{place.in_features} -> {place.out_features}"
            rows.append((place.name, place.kind, width, f"{count:,}", *self._sizes(sizes)))
        lines = [table(rows, "<<<><")]
        if self.implementations:
            ways = (
                f"{', '.join(names)} for {tokens:,} token{'s' * (tokens > 1)}"
                for tokens, names in self.implementations.items()
            )
            lines.append(f"routed sums: {'; '.join(ways)}")
        if self.uncalled:
            lines.append(f"not called by the given inputs: {', '.join(self.uncalled)}")
        share = 100 * self.num_parameters / max(self.base_parameters, 1)
        lines.append(
            f"{config.method}: {config.summary()}; {len(self.places)} places, {self.num_parameters:,} trainable "
            f"parameters ({share:.2f}% of the base model's {self.base_parameters:,})"
        )
        return "\n".join(lines)

    def _sizes(self, cell: str) -> list[str]:
        """The cell of a column that is there where layers differ in their sizes."""
        return [cell] if any(self.config.sizes_at(place) for place in self.places) else []


def describe(model: nn.Module, config: MoeConfig, inputs: Mapping[str, Any] | None = None) -> Description:
    """Tell what a configuration would do to a model, without changing either.

    Args:
        model: The base model; quantized and meta-device models too.
        config: A routed configuration.
        inputs: Keyword arguments of the model, as `tokenizer(text, return_tensors="pt")`, to run it once on and see
            which places are called; None runs nothing.

    Returns:
        A table when printed, and its numbers as attributes.

    Raises:
        ValueError: An argument is of another kind, nothing matches, a router matches, or the configuration cannot
            work; the message gives a way out.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"describe: model={shown(model)} is no model. Load it first, as in "
            "AutoModelForCausalLM.from_pretrained(name)."
        )
    if not isinstance(config, MoeConfig):
        raise ValueError(
            f"describe: config={shown(config)} is no configuration of moe_peft. Give an instance of one of its "
            "configuration classes."
        )
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ValueError(
            f"describe: inputs={shown(inputs)} are no keyword arguments. Give a dict of tensors, as a tokenizer "
            "returns."
        )
    config = copy.deepcopy(config)
    places = choose_places(model, config, **get_quantization_kwargs(model))
    parameters: list[int] = []
    implementations: dict[int, list[str]] = {}
    for place in places:
        with torch.device("meta"):
            parts = config.at(place).build(place)
        check_fit(config, parts)
        modules = [module for module in (parts.router, parts.experts) if module is not None]
        for tokens in TOKENS:
            way = _implementation(model, place, parts, tokens)
            if way is not None and way not in implementations.setdefault(tokens, []):
                implementations[tokens].append(way)
        parameters.append(sum(_trainable(module) for module in modules))
    uncalled = None
    if inputs is not None:
        called = called_modules(model, [place.name for place in places], inputs)
        uncalled = [place.name for place in places if place.name not in called]
    return Description(config, places, parameters, num_base_weights(model), implementations, uncalled)


def _trainable(module: nn.Module) -> int:
    """Parameters of a part that training changes; a part names those that it never trains."""
    frozen = module.frozen if isinstance(module, ModulePart) else ()
    return sum(math.prod(shape_of(parameter)) for name, parameter in module.named_parameters() if name not in frozen)


def _implementation(model: nn.Module, place: Place, parts: RoutedParts, num_tokens: int) -> str | None:
    """How the experts of a place compute the sum for a number of tokens; None where they know one way."""
    bank = parts.experts
    if not isinstance(bank, Experts):
        return None
    if parts.router is not None:
        num_slots = parts.router.num_slots
    else:
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        num_slots = getattr(text, "num_experts_per_tok", None) or bank.num_choices
    parameter = next(model.parameters(), None)
    device = "cpu" if parameter is None or parameter.is_meta else parameter.device.type
    dtype = None if parameter is None or not parameter.is_floating_point() else parameter.dtype
    return bank.implementation(num_tokens, num_slots, dtype=dtype, device_type=device)
