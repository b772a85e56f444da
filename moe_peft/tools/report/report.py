"""The report on a routing: what was measured, in numbers and in words, and the files that it is written to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...config.card_section import AdapterFacts
from ...config.config import MoeConfig
from ...files import filled_folder, write_text
from ...layers import routed_layers
from ...messages import shown
from ..similarity import delta_similarity
from .advice import advise
from .curves import Curves, read_curves
from .evidence import Advice, Evidence
from .groups import chance, pair_means, shares_by_group
from .measure import PlaceRouting, measure_routing, tokens_of
from .measures import divergence, known_mean
from .numbers import of_cosines, of_place, of_sentence, rounded
from .observe import Batch, base_model, check_batches
from .sentences import Sentence, read_sentences, shown_places

PAGE, NUMBERS = "index.html", "numbers.json"


@dataclass(frozen=True)
class RoutingReport:
    """What a model's routers decide about some texts.

    Attributes:
        title: Name of the adapter or model.
        facts: What is known about the adapter; None without one.
        groups: Names of the groups of texts.
        tokens: Tokens of each group that counted.
        places: What was decided, place by place.
        similarity: Place -> (E, E) cosines of what the experts add.
        curves: How the routing changed in training; None where no history was found.
        sentences: Texts token by token.
        advice: What it means.
    """

    title: str
    facts: AdapterFacts | None
    groups: list[str]
    tokens: dict[str, int]
    places: list[PlaceRouting]
    similarity: dict[str, torch.Tensor] = field(default_factory=dict)
    curves: Curves | None = None
    sentences: list[Sentence] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)

    def divergences(self) -> dict[str, float]:
        """Place -> how far apart the groups use the experts, mean over their pairs; empty for one group."""
        found = {own.place: divergence(shares_by_group(own, self.groups)) for own in self.places}
        return {place: value for place, value in found.items() if value == value}

    def divergence_matrix(self) -> list[list[float]]:
        """Divergence of each pair of groups, mean over the places."""
        return pair_means(self.places, self.groups)

    def chance(self) -> float:
        """What chance gives for a divergence; NaN where every group has one batch only."""
        return chance(self.places, self.groups)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON holds them; what is not known is null."""
        apart = known_mean(self.divergences().values())
        pairs = self.divergence_matrix() if len(self.groups) > 1 else []
        return rounded(
            {
                "title": self.title,
                "method": None if self.facts is None else self.facts.method,
                "base_model": None if self.facts is None else self.facts.base_model,
                "groups": {group: {"tokens": self.tokens[group]} for group in self.groups},
                "places": [of_place(own, self.groups) for own in self.places],
                "divergence": {"mean": apart, "by_chance": self.chance(), "pairs": pairs},
                "similarity": {place: of_cosines(own) for place, own in self.similarity.items()},
                "history": None if self.curves is None else asdict(self.curves),
                "sentences": [of_sentence(own) for own in self.sentences],
                "advice": [asdict(own) for own in self.advice],
            }
        )

    def save(self, folder: str | Path, *, plots: bool | None = None) -> Path:
        """Write the page, the numbers, and the plots, all of them or none.

        Args:
            folder: Folder to write to; it is made where there is none.
            plots: Whether to draw PNG files, which needs matplotlib; None draws them where it is installed.

        Returns:
            Path of the page, index.html. The numbers lie beside it in numbers.json.

        Raises:
            ValueError: The folder is a file.
            ImportError: Plots are asked for, and matplotlib is not installed.
        """
        from .page import page
        from .plots import draw, has_matplotlib

        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{shown(str(folder))} is a file. Name a folder for the report.")
        if plots and not has_matplotlib():
            raise ImportError("plots=True needs matplotlib: pip install matplotlib, or leave the plots out.")
        with filled_folder(folder) as growing:
            write_text(growing / NUMBERS, json.dumps(self.to_dict(), indent=1, allow_nan=False))
            if plots or (plots is None and has_matplotlib()):
                draw(self, growing)
            write_text(growing / PAGE, page(self))
        return folder / PAGE


def routing_report(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    *,
    tokenizer: Any = None,
    history: str | Path | None = None,
    title: str | None = None,
    max_tokens: int | None = None,
    per_group: int = 2,
) -> RoutingReport:
    """Measure what the routers of a model decide about some texts, and say what it means.

    The model runs in evaluation without gradients, and is left as it was. Padding counts nowhere.

    Args:
        model: A model with routed adapters, whose active ones are measured, or a mixture of experts whose own routers
            are.
        batches: Name of a group -> batches of its texts, as dicts of tensors; write {"all": batches} for one group.
        tokenizer: Of the model, to show texts token by token; None leaves that out.
        history: Folder with the history of the training run; None leaves the change over training out.
        title: What the page calls the model; None takes the name of the base model.
        max_tokens: Stop a group after this many tokens; None takes all.
        per_group: Texts of each group that are shown token by token.

    Raises:
        TypeError: The model is no module.
        ValueError: The batches have no groups, nothing routes, or there is no token.
    """
    check_batches(batches)
    for name, value, least in (("max_tokens", max_tokens, 1), ("per_group", per_group, 0)):
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name}={shown(value)} must be a whole number of at least {least}.")
    kept = {group: list(own) for group, own in batches.items()}
    places = measure_routing(model, kept, max_tokens=max_tokens)
    groups = [group for group in kept if tokens_of(places, group)]
    sentences = []
    if tokenizer is not None and per_group:
        sentences = read_sentences(model, tokenizer, kept, shown_places(places), per_group=per_group)
    config = _config(model, places)
    facts = None if config is None else config.facts()
    similarity, curves = _similarities(model, places), None if history is None else read_curves(history)
    apart = known_mean(divergence(shares_by_group(own, groups)) for own in places) if len(groups) > 1 else math.nan
    evidence = Evidence(places, apart, chance(places, groups), similarity, curves, config)
    return RoutingReport(
        title=title or (facts.base_model if facts and facts.base_model else type(base_model(model)).__name__),
        facts=facts,
        groups=groups,
        tokens={group: tokens_of(places, group) for group in groups},
        places=places,
        similarity=similarity,
        curves=curves,
        sentences=sentences,
        advice=advise(evidence),
    )


def _similarities(model: nn.Module, places: Iterable[PlaceRouting]) -> dict[str, torch.Tensor]:
    names = {own.adapter for own in places} & {name for layer in routed_layers(model) for name in layer.experts}
    found: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        found |= delta_similarity(model, name)
    return {place: own for place, own in found.items() if len(own) > 1}


def _config(model: nn.Module, places: Iterable[PlaceRouting]) -> MoeConfig | None:
    own = getattr(model, "peft_config", {}).get(next(iter(places)).adapter)
    return own if isinstance(own, MoeConfig) else None
