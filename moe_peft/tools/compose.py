"""Existing LoRAs as the experts of one routed adapter: y = W0 x + sum_e router(x)_e s_e B_e A_e x.

Any router of the registry may decide: trained alone while the experts stay, or without a gradient, by centroids of
texts (`fit_centroids`, Belofsky, arXiv 2311.10847) or by directions of the experts (`fit_directions`, Arrow, arXiv
2405.11157).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..layers import RoutedLayer, routed_layers
from ..messages import shown
from ..methods import RoutedConfig
from ..options import option_values
from .checks import check_module
from .stock_lora import Pair, StockLora, read_lora

TRAINED = ("all", "router")
# Fields that follow from the LoRAs, beside the scale, which a configuration fills in by itself.
FOLLOWING = ("num_experts", "r", "use_rslora", "target_modules", "exclude_modules", "per_layer")


def compose(
    base: nn.Module,
    adapters: Mapping[str, str],
    config: RoutedConfig | None = None,
    *,
    adapter_name: str = "default",
    trained: str = "all",
) -> PeftModel:
    """Put LoRAs on a model as the experts of one routed adapter, in the order of their names here.

    Ranks are filled up to the largest with rows that add nothing, each LoRA keeps its own scale, and one that lacks a
    place of another adds nothing there.

    Args:
        base: The base model, without adapters.
        adapters: Name of an expert -> folder of a LoRA of stock peft, or its name on the Hub.
        config: Router, losses and task type; what follows from the LoRAs (number of experts, rank, places) is left at
            its default, and each LoRA's own scale takes the place of lora_alpha. None takes the two best experts of
            each token, with weights that sum to one.
        adapter_name: Name of the new adapter.
        trained: "all", or "router", which freezes the experts; `train_router_alone` does so after loading.

    Returns:
        The adapted model, in which the router is new.

    Raises:
        ValueError: An adapter is no plain LoRA, a place is no linear layer of the model or of another width, or the
            configuration does not go with pairs. The model is as it was.
    """
    if not isinstance(adapters, Mapping) or not adapters or not all(isinstance(name, str) for name in adapters):
        raise ValueError(f"adapters={shown(adapters)} must be a dict from names of experts to folders of LoRAs.")
    check_module(base, "compose", "base")
    if trained not in TRAINED:
        raise ValueError(f"trained={shown(trained)} must be one of {TRAINED}.")
    loras = [read_lora(folder) for folder in adapters.values()]
    places = check_places(base, loras)
    rank = max(lora.rank for lora in loras)
    if config is None:
        config = RoutedConfig(
            num_experts=len(loras),
            top_k=min(2, len(loras)),
            norm_topk_prob=len(loras) > 1,
            task_type=loras[0].config.task_type,
        )
    model = get_peft_model(base, filled(config, places, len(loras), rank), adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    put_pairs(model, adapter_name, {place: [lora.pairs.get(place) for lora in loras] for place in places})
    if trained == "router":
        train_router_alone(model, adapter_name)
    return model


def check_places(base: nn.Module, loras: Sequence[StockLora]) -> list[str]:
    """The places of all LoRAs, checked against a model.

    Args:
        base: The model.
        loras: The LoRAs.

    Raises:
        ValueError: A place is no linear layer of the model, or of another width.
    """
    modules = dict(base.named_modules())
    places = dict.fromkeys(place for lora in loras for place in lora.pairs)
    for lora in loras:
        for place, pair in lora.pairs.items():
            module: Any = modules.get(place)
            if not isinstance(module, (nn.Linear, Conv1D)):
                kind = "no module" if module is None else f"a {type(module).__name__}"
                raise ValueError(
                    f"The LoRA in {shown(lora.name)} adapts {shown(place)}, which is {kind} of this model, and a "
                    "linear layer is needed. Is it of another base model, or has the model adapters?"
                )
            widths = tuple(module.weight.shape) if isinstance(module, Conv1D) else tuple(module.weight.shape)[::-1]
            if (pair.A.shape[1], pair.B.shape[0]) != widths and module.weight.dim() == 2:
                own = (pair.A.shape[1], pair.B.shape[0])
                if not hasattr(module.weight, "quant_state"):
                    raise ValueError(
                        f"The LoRA in {shown(lora.name)} has widths {own} at {shown(place)}, where the model has "
                        f"{widths}: it is of another base model."
                    )
    return list(places)


def filled(config: RoutedConfig, places: Sequence[str], num_experts: int, rank: int) -> RoutedConfig:
    """A configuration with what follows from the LoRAs.

    Args:
        config: What the user chose.
        places: Full names of the adapted layers.
        num_experts: E.
        rank: Of every expert.

    Raises:
        ValueError: It sets one of these fields to something else, or its experts are no pairs of one layer.
    """
    if not isinstance(config, RoutedConfig):
        raise ValueError(f"config={shown(config)} must be a RoutedConfig, which has routers by name.")
    follows: dict[str, Any] = {
        "num_experts": num_experts,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "target_modules": set(places),
        "exclude_modules": None,
        "per_layer": None,
    }
    defaults = {own.name: own.default for own in dataclasses.fields(config)}
    for name in FOLLOWING:
        value = getattr(config, name)
        if value not in (defaults[name], follows[name]):
            raise ValueError(
                f"config: {name}={shown(value)} follows from the LoRAs, which give {shown(follows[name])}. Leave it "
                "out."
            )
    shapes = config.kind.saved_shapes(2, 3, option_values(config.kind, config.experts_args))
    if config.wraps != "linear" or not config.kind.mergeable or shapes != {"A": (2, 3), "B": (2, 3)}:
        raise ValueError(
            f"config: experts={shown(config.experts)} with wraps={shown(config.wraps)} are no pairs of matrices "
            "beside a linear layer, as a LoRA has. Leave experts, experts_args and wraps at their defaults."
        )
    top_k = None if config.top_k is None else min(config.top_k, num_experts)
    return dataclasses.replace(config, **follows, top_k=top_k)


@torch.no_grad()
def put_pairs(model: PeftModel, adapter_name: str, pairs: Mapping[str, Sequence[Pair | None]]) -> None:
    """Give an adapter's experts the values of pairs; rows that no pair fills add nothing.

    Args:
        model: A model with the adapter, whose scale takes none of the pairs'.
        adapter_name: Which adapter.
        pairs: Place -> the pair of each expert, None for one that adds nothing.
    """
    for name, layer in _layers(model, adapter_name).items():
        bank, reads = layer.experts[adapter_name], layer.router[adapter_name].reads
        bank.B.zero_()
        if reads == "activations":
            bank.A.zero_()  # rows that add nothing must not be read either
        for expert, pair in enumerate(pairs[name]):
            put_pair(bank, expert, pair)


@torch.no_grad()
def put_pair(bank: Any, expert: int, pair: Pair | None) -> None:
    """Give one expert the values of a pair; rows that it does not fill stay as they are.

    Args:
        bank: A bank of low-rank pairs.
        expert: Number of the expert.
        pair: The pair; None leaves the expert as it is.
    """
    if pair is not None:
        bank.A[expert, : pair.rank] = pair.A.to(bank.A)
        bank.B[expert, : pair.rank] = (pair.B / bank.scaling).T.to(bank.B)


def train_router_alone(model: nn.Module, adapter_name: str = "default") -> None:
    """Freeze the experts of an adapter, also where adapters are activated or frozen as a whole later on.

    Args:
        model: A model with the adapter.
        adapter_name: Which adapter.

    Raises:
        ValueError: No layer holds a router of it.
    """
    layers = [layer for layer in routed_layers(model) if adapter_name in layer.router]
    if not layers:
        raise ValueError(f"No layer holds a router of the adapter {shown(adapter_name)}.")
    for layer in layers:
        bank = layer.experts[adapter_name]
        bank.frozen = tuple(name for name, _ in bank.named_parameters())
        bank.requires_grad_(False)


def _layers(model: PeftModel, adapter_name: str) -> dict[str, RoutedLayer]:
    named = model.get_base_model().named_modules()
    return {name: own for name, own in named if isinstance(own, RoutedLayer) and adapter_name in own.experts}
