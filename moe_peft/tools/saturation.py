"""When does a routing settle: how far the experts of tokens at a checkpoint are those of a later one.

saturation(t) = mean over tokens of |experts_t intersect experts_T| / k          (OLMoE, arXiv 2409.02060, 5.1)
change rate(t) = 1 - the same between checkpoints t - 1 and t                    (arXiv 2505.10860)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..messages import shown
from ..types import Routing
from .checks import check_finite, check_peft_model, listed_batches
from .report.measure import valid_gates
from .report.observe import Batch, observing, run

NAME = "_checkpoint"  # of the adapter that a checkpoint is loaded as


@dataclass(frozen=True)
class Saturation:
    """How a routing settled over checkpoints.

    Attributes:
        checkpoints: Their folders, in order.
        saturation: Place -> overlap of each checkpoint with the last one, in [0, 1]; the last is 1.
        change_rate: Place -> share of the choices that changed since the checkpoint before; NaN for the first.
    """

    checkpoints: list[str]
    saturation: dict[str, list[float]]
    change_rate: dict[str, list[float]]


def expert_choices(model: Any, batches: Iterable[Batch], top_k: int = 1) -> dict[str, torch.Tensor]:
    """The experts with the largest weights of every token that is no padding.

    Args:
        model: A model with routed adapters, or a mixture of experts; it runs in the mode that it is in.
        batches: Texts, as dicts of tensors.
        top_k: Experts of each token.

    Returns:
        Place -> (T, top_k) int64 experts.
    """
    found: dict[str, list[torch.Tensor]] = {}

    def observe(place: str, adapter: str, routing: Routing) -> None:
        gates_TE = valid_gates(routing)
        check_finite(gates_TE, f"The weights of the experts at {place}", "The checkpoint, or its base, is broken.")
        found.setdefault(place, []).append(gates_TE.topk(min(top_k, gates_TE.shape[1])).indices)

    with torch.no_grad(), observing(model, observe):
        for batch in batches:
            run(model, batch)
    return {place: torch.cat(own) for place, own in found.items()}


def overlap(first_TK: torch.Tensor, second_TK: torch.Tensor) -> float:
    """Mean over the tokens of the share of a token's experts that both have.

    Args:
        first_TK: (T, K) experts, those of a token all different.
        second_TK: The same of the other.
    """
    return float((first_TK[:, :, None] == second_TK[:, None]).any(-1).double().mean())


def routing_saturation(
    model: PeftModel, checkpoints: Sequence[str | Path], batches: Sequence[Mapping[str, Any]], *, top_k: int = 1
) -> Saturation:
    """Compare what the routers of an adapter decide at several checkpoints of its training.

    Args:
        model: A `PeftModel` on the checkpoints' base model; each checkpoint is loaded beside its adapters, and taken
            away again.
        checkpoints: Folders in order, the last one the one that the others are compared with.
        batches: Texts, as dicts of tensors.
        top_k: Experts of each token that are compared.

    Raises:
        ValueError: There are fewer than two checkpoints, no batch, or one cannot be loaded; the model's adapters are
            as they were.
    """
    check_peft_model(model, "routing_saturation")
    named = isinstance(checkpoints, Sequence) and all(isinstance(folder, (str, Path)) for folder in checkpoints)
    if not named or isinstance(checkpoints, str) or len(checkpoints) < 2:
        raise ValueError(f"checkpoints={shown(checkpoints)} must be a list of two folders or more.")
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"top_k={shown(top_k)} must be a whole number of at least 1.")
    if NAME in model.peft_config:
        raise ValueError(f"The model has an adapter {shown(NAME)} already. Delete it (model.delete_adapter).")
    batches = listed_batches(batches, "routing_saturation")
    choices = [_choices_of(model, folder, batches, top_k) for folder in checkpoints]
    places = list(choices[-1])
    for folder, own in zip(checkpoints, choices, strict=True):
        if not own or set(own) != set(places):
            raise ValueError(
                f"The checkpoint {shown(str(folder))} decides at {len(own)} places, and the last one at "
                f"{len(places)}: they are of other adapters, or one has no router. Compare checkpoints of one run."
            )
    nan = float("nan")
    return Saturation(
        checkpoints=[str(folder) for folder in checkpoints],
        saturation={place: [overlap(own[place], choices[-1][place]) for own in choices] for place in places},
        change_rate={
            place: [nan, *(1 - overlap(a[place], b[place]) for a, b in pairwise(choices))] for place in places
        },
    )


def _choices_of(model: PeftModel, folder: str | Path, batches: Sequence[Batch], top_k: int) -> dict[str, torch.Tensor]:
    active, training, name = list(model.active_adapters), model.training, NAME
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.load_adapter(str(folder), name)
        model.set_adapter(name)
        return expert_choices(model.eval(), batches, top_k)
    finally:
        if name in model.peft_config:
            base: Any = model.base_model
            base.set_adapter(active)
            model.delete_adapter(name)
        model.train(training)
        for parameter, own in trained:
            parameter.requires_grad_(own)
