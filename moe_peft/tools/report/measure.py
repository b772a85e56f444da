"""Runs a model over groups of batches, and adds up what its routers decide: by place, by group, in two halves.

Padding counts nowhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ...forward.find import find_trackers
from ...layers import routed_layers
from ...losses.masking import masked_sum
from ...selection.scoring import evaluating
from ...telemetry.stacked import add, as_sums
from ...telemetry.statistics import RoutingStatistics
from ...types import Routing
from ..checks import check_finite
from .observe import Batch, check_batches, observing, run

Key = tuple[str, str]
Decides = Literal["router", "backbone", "nobody"]
CONSTANT = 1e-6


@dataclass
class PlaceRouting:
    """What was decided at one place.

    Attributes:
        place: Name of the module.
        adapter: Name of the adapter; "backbone" where none routes.
        num_experts: E.
        follows_backbone: Whether the backbone's router decides.
        dense: Whether every token uses every expert.
        sums: (group, half) -> sums over its tokens, on the CPU in float64.
        entropies: The same -> sum over its tokens of the entropy of the token's own weights over log E.
        lowest, highest: (E,) smallest and largest weight that any token gave.
    """

    place: str
    adapter: str
    num_experts: int
    follows_backbone: bool = False
    dense: bool = True
    sums: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    entropies: dict[tuple[str, int], float] = field(default_factory=dict)
    lowest: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    highest: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def layer(self) -> int | None:
        """Index of the layer that it lies in; None outside of numbered layers."""
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.place)
        return int(found.group(1)) if found else None

    @property
    def kind(self) -> str:
        """Its name without the index of the layer."""
        return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", self.place, count=1)

    @property
    def decides(self) -> Decides:
        """Who decides: a router of the adapter, the backbone's, or nobody, as all tokens are treated alike."""
        if self.follows_backbone:
            return "backbone"
        spread = (self.highest - self.lowest).abs().max() if self.highest.numel() else torch.tensor(0.0)
        return "router" if float(spread) > CONSTANT else "nobody"

    def statistics(self, group: str | None = None, half: int | None = None) -> RoutingStatistics | None:
        """Sums over the tokens of a group, or of all.

        Args:
            group: Its name; None for all.
            half: Of every second batch alone, 0 or 1; None for both.

        Returns:
            None where no token was seen.
        """
        total: list[torch.Tensor] | None = None
        for (own_group, own_half), sums in self.sums.items():
            if group in (None, own_group) and half in (None, own_half):
                total = sums if total is None else add(total, sums)
        return None if total is None or not float(total[2]) else RoutingStatistics(*total)

    @property
    def total(self) -> RoutingStatistics:
        """Sums over all tokens."""
        found = self.statistics()
        assert found is not None
        return found

    @property
    def token_entropy(self) -> float:
        """Mean over the tokens of the entropy of their own weights over log E: 0 for one expert, 1 for all alike."""
        return sum(self.entropies.values()) / max(float(self.total.tokens), 1.0)

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that a token asks for."""
        return float(self.total.requests.sum() / self.total.tokens.clamp_min(1))

    def add(self, label: tuple[str, int], routing: Routing) -> None:
        """Add a decision.

        Args:
            label: Group, and half of it.
            routing: The decision.

        Raises:
            ValueError: A weight is not finite.
        """
        gates_TE = valid_gates(routing)
        what = f"The weights of the experts at {self.place} (adapter {self.adapter})"
        check_finite(gates_TE, what, "A weight of model or adapter is broken, or overflows in its dtype.")
        own = [part.detach().double().cpu() for part in as_sums(RoutingStatistics.of(routing))]
        self.sums[label] = add(self.sums[label], own) if label in self.sums else own
        self.entropies[label] = self.entropies.get(label, 0.0) + token_entropy(routing)
        self.dense = self.dense and routing.experts is None
        if len(gates_TE):
            low, high = gates_TE.amin(0), gates_TE.amax(0)
            self.lowest = torch.minimum(self.lowest, low) if self.lowest.numel() else low
            self.highest = torch.maximum(self.highest, high) if self.highest.numel() else high


def valid_gates(routing: Routing) -> torch.Tensor:
    """(T', E) float32 weights of the tokens that count, on the CPU."""
    gates_TE = routing.gate_matrix().detach().float()
    return (gates_TE if routing.valid is None else gates_TE[routing.valid]).cpu()


def token_entropy(routing: Routing) -> float:
    """Sum over the tokens that count of the entropy of their own weights, over its maximum log E."""
    if routing.num_experts < 2:
        return 0.0
    gates_TE = routing.gate_matrix().detach().double().clamp_min(0)
    shares_TE = gates_TE / gates_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return float(masked_sum(torch.special.entr(shares_TE).sum(-1), routing)) / math.log(routing.num_experts)


def measure_routing(
    model: nn.Module, batches: Mapping[str, Iterable[Batch]], *, max_tokens: int | None = None
) -> list[PlaceRouting]:
    """Run a model over groups of batches, in evaluation and without gradients, and add up what is decided.

    Args:
        model: A model with routed adapters, or a mixture of experts; it is left as it was.
        batches: Name of a group -> batches of its samples, as dicts of tensors.
        max_tokens: Stop a group after this many tokens; None takes all.

    Returns:
        One entry for each place and adapter, in the order in which they decide.

    Raises:
        TypeError: The model is no module.
        ValueError: The batches have no groups, nothing routes there, or there is no token.
    """
    check_batches(batches)
    find_trackers(model)  # refuses what is no model
    found: dict[Key, PlaceRouting] = {}
    label = ("", 0)

    def observe(place: str, adapter: str, routing: Routing) -> None:
        own = found.setdefault((place, adapter), PlaceRouting(place, adapter, routing.num_experts))
        own.add(label, routing)

    with evaluating(model), observing(model, observe):
        for group, own in batches.items():
            for number, batch in enumerate(own):
                label = (group, number % 2)
                run(model, batch)
                if max_tokens is not None and tokens_of(found.values(), group) >= max_tokens:
                    break
    places = [own for own in found.values() if own.statistics() is not None]
    if not places:
        raise ValueError(
            "There is no decision to report: the batches are empty, or the adapter is disabled or merged. Give texts, "
            "and enable the adapter."
        )
    following = {layer.place: layer for layer in routed_layers(model)}
    for place in places:
        layer = following.get(place.place)
        place.follows_backbone = layer is None or layer.router_of(place.adapter) is None
    return places


def tokens_of(places: Iterable[PlaceRouting], group: str) -> int:
    """Tokens of a group that counted, at the place that has seen most.

    Args:
        places: What was measured.
        group: Name of the group.
    """
    found = (place.statistics(group) for place in places)
    return max((int(own.tokens) for own in found if own is not None), default=0)
