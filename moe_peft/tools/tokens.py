"""Which experts each token of a text uses, from one forward pass of an adapted model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import telemetry
from ..types import Routing
from .checks import check_finite


@dataclass(frozen=True)
class TokenRouting:
    """What the routers decided about a text.

    Attributes:
        tokens: The text's tokens, as the tokenizer writes them.
        weights: Place -> (T, E) combine weight of every expert for every token.
    """

    tokens: list[str]
    weights: dict[str, torch.Tensor]

    def top(self, place: str, count: int = 2) -> list[list[tuple[int, float]]]:
        """The experts that each token uses most.

        Args:
            place: Name of the module.
            count: At most so many.

        Returns:
            For each token pairs of expert and weight, the largest first; experts of weight zero are left out.
        """
        weights_TE = self.weights[place]
        values, experts = weights_TE.topk(min(count, weights_TE.shape[1]))
        return [
            [(int(e), float(v)) for e, v in zip(row, own, strict=True) if v > 0]
            for row, own in zip(experts, values, strict=True)
        ]


def token_routing(model: nn.Module, tokenizer: Any, text: str) -> TokenRouting:
    """Run a model on a text and read what its routers decided.

    Args:
        model: With a routed adapter.
        tokenizer: Of the model.
        text: Any.

    Raises:
        ValueError: The text has no tokens, or nothing was routed, as the adapter is disabled.
    """
    inputs = tokenizer(text, return_tensors="pt")
    ids = inputs["input_ids"]
    if ids.numel() == 0:
        raise ValueError("The text has no tokens. Give some words.")
    device = next(model.parameters()).device
    with torch.no_grad(), telemetry.record(model.eval()) as routings:
        model(input_ids=ids.to(device))
    weights = {place: _matrix(made[0]) for place, made in routings.items() if made}
    if not weights:
        raise ValueError("Nothing was routed: the adapter is disabled or merged. Enable it, or load it anew.")
    return TokenRouting(tokenizer.convert_ids_to_tokens(ids[0].tolist()), weights)


def _matrix(routing: Routing) -> torch.Tensor:
    weights_TE = routing.gate_matrix().float().cpu()
    check_finite(weights_TE, "The weights of the experts", "A weight of model or adapter is broken, or overflows.")
    return weights_TE
