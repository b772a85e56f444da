"""Which experts of a backbone to train for a task: the fewest whose scores add up to p, layer by layer.

    E_s = the smallest prefix of the experts, in descending order of their scores, with sum_{i in E_s} R_i >= p

R is the gate or the token score of `moe_peft.score_experts` (Wang et al., 2024, arXiv 2407.01906, section 3). Each
layer is selected on its own, by its scores as they are; the authors' published configurations follow this rule, while
their published script first divides by the sum over layers, which gives other experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from ..messages import shown
from .files import is_whole, layer_index, read_object, wrong_experts
from .scores import AGGREGATES, CRITERIA, ExpertScores

DEFAULT_P = {"token": 0.2, "gate": 0.1}
# Scores that differ by less are the same number in another order of summation.
DECIMALS = 12
TOLERANCE = 1e-9
MAX_P = 1e30
NON_EXPERT_MODULES = (
    "non_expert_modules=True trains everything besides the experts as well (attention, norms, embeddings, routers), "
    "which an adapter of selected experts does not. Write false there, and name what to train beside the experts in "
    "the adapter's configuration: modules_to_save=['q_proj', 'v_proj'], train_router=True."
)


FORM = (
    "it must hold {'experts': {'1': [8, 26], ...}, 'shared_experts': false, 'non_expert_modules': false}, with layer "
    "indices as keys and lists of different expert ids"
)


@dataclass(frozen=True)
class SelectionRule:
    """How experts were selected; see `select_experts`."""

    p: float
    criterion: str = "token"
    aggregate: str = "token"
    min_experts: int = 0
    normalize_scores: bool = False

    def __str__(self) -> str:
        """One line."""
        parts = [f"{self.criterion} scores, p={self.p:g}"]
        parts += ["of each layer's mass"] if self.normalize_scores else []
        parts += ["mean of sample means"] if self.aggregate == "sample" else []
        parts += [f"at least {self.min_experts} per layer"] if self.min_experts else []
        return ", ".join(parts)


@dataclass(frozen=True)
class ExpertSelection:
    """Selected experts of every sparse layer.

    Attributes:
        experts: Index of the decoder layer, as a string -> experts, highest score first. This is what
            `EsftConfig(experts=...)` takes.
        shared_experts: Whether to train the experts that every token uses as well; `EsftConfig` calls it
            `train_shared_experts`.
        non_expert_modules: Always False, kept for the authors' file format.
        num_experts: Layer -> E; empty where a file does not tell.
        expert_parameters: Layer -> parameters of one expert; empty where unknown.
        model_parameters: Parameters of the backbone; None where unknown.
        rule: How the experts were selected; None where unknown.
    """

    experts: dict[str, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False
    num_experts: dict[str, int] = field(default_factory=dict, compare=False)
    expert_parameters: dict[str, int] = field(default_factory=dict, compare=False)
    model_parameters: int | None = field(default=None, compare=False)
    rule: SelectionRule | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.experts, dict) or not all(isinstance(layer, str) for layer in self.experts):
            raise ValueError(f"experts={shown(self.experts)} must be a dict from layers as strings to expert ids.")
        for name in ("num_experts", "expert_parameters"):
            counts = getattr(self, name)
            least = 1 if name == "num_experts" else 0
            if not isinstance(counts, dict) or not all(_counts(*entry, least) for entry in counts.items()):
                raise ValueError(f"{name}={shown(counts)} must be a dict from layers as strings to whole numbers.")
        reason = wrong_experts(self.experts, self.num_experts)
        if reason is not None:
            raise ValueError(f"experts={shown(self.experts)} is no selection: {reason}.")
        for name in ("shared_experts", "non_expert_modules"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be True or False.")
        if self.non_expert_modules:
            raise ValueError(NON_EXPERT_MODULES)

    @property
    def counts(self) -> dict[str, int]:
        """Layer -> number of selected experts."""
        return {layer: len(ids) for layer, ids in self.experts.items()}

    @property
    def num_selected(self) -> int:
        """Selected experts of all layers."""
        return sum(self.counts.values())

    @property
    def share(self) -> float | None:
        """Selected experts over all experts; None where the number of experts is unknown."""
        return self.num_selected / sum(self.num_experts.values()) if self.num_experts else None

    @property
    def num_parameters(self) -> int | None:
        """Parameters of the selected experts; None where the size of an expert is unknown."""
        if not self.expert_parameters:
            return None
        return sum(count * self.expert_parameters[layer] for layer, count in self.counts.items())

    def overlap(self, other: ExpertSelection) -> dict[str, float]:
        """Jaccard index of two selections, |both| / |either|, layer by layer.

        Args:
            other: A selection of the same backbone, for another task for instance.

        Returns:
            Layer -> 0 (disjoint) to 1 (the same, or both empty).

        Raises:
            ValueError: `other` is no selection.
        """
        if not isinstance(other, ExpertSelection):
            raise ValueError(f"other={shown(other)} must be an ExpertSelection, as select_experts returns it.")
        layers = sorted(self.experts.keys() | other.experts.keys(), key=int)
        pairs = {layer: (set(self.experts.get(layer, ())), set(other.experts.get(layer, ()))) for layer in layers}
        return {layer: len(a & b) / len(a | b) if a | b else 1.0 for layer, (a, b) in pairs.items()}

    def save(self, path: str | Path) -> None:
        """Write the authors' JSON form: `experts`, `shared_experts` and `non_expert_modules`.

        Where it is known, `num_experts` follows, which their readers pass over: it tells backbones apart.

        Args:
            path: The file; its folder must exist.
        """
        names = ["experts", "shared_experts", "non_expert_modules", *(["num_experts"] if self.num_experts else [])]
        write_text(path, json.dumps({name: getattr(self, name) for name in names}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ExpertSelection:
        """Read what `save` wrote, or a configuration of the authors.

        Args:
            path: The file.

        Raises:
            ValueError: The file has another form, or asks for more than experts.
        """
        content = read_object(path, f"selection of experts: {FORM}")
        experts = content.get("experts")
        reason = wrong_experts(experts) if isinstance(experts, dict) else "it has no 'experts'"
        if experts is None or reason is not None:
            raise ValueError(f"{path} is no selection of experts: {FORM}; {reason}.")
        fields: dict[str, Any] = {
            name: content[name] for name in ("shared_experts", "non_expert_modules") if name in content
        }
        if isinstance(content.get("num_experts"), dict):
            fields["num_experts"] = content["num_experts"]
        try:
            return cls({layer: experts[layer] for layer in sorted(experts, key=int)}, **fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def select_experts(
    scores: ExpertScores,
    p: float | None = None,
    *,
    criterion: str = "token",
    aggregate: str = "token",
    min_experts: int = 0,
    normalize_scores: bool = False,
    max_parameters: int | None = None,
) -> ExpertSelection:
    """Select the experts of a task, layer by layer.

    In every layer the experts are sorted by score, ties by the smaller id, and taken until their scores add up to p.
    Gate scores are used as they are: their sum over a layer is below one unless the backbone rescales its weights, and
    above one where it scales them, so the same p means more or fewer experts on another backbone;
    `normalize_scores` makes p a share of the layer's sum.

    Args:
        scores: Scores of `moe_peft.score_experts`, or of a file.
        p: Score that the selected experts of a layer reach together; None means 0.2 for token and 0.1 for gate scores
            (the paper's). 0 selects nothing; a p that the layer's scores do not exceed (1 and more for token scores)
            selects every expert with a score above zero.
        criterion: "token", the share of tokens, or "gate", the mean weight.
        aggregate: "token", the mean over all tokens, or "sample", the mean of the samples' means.
        min_experts: Take at least this many per layer.
        normalize_scores: Whether p is a share of the layer's summed scores.
        max_parameters: Parameters that the selected experts have at most; instead of p, of which the largest is taken
            that selects no more.

    Returns:
        The selection; `EsftConfig(experts=selection.experts)` trains it.

    Raises:
        ValueError: An argument is outside its range.
    """
    if not isinstance(scores, ExpertScores):
        raise ValueError(
            f"scores={shown(scores)} must be what moe_peft.score_experts returns, or "
            "moe_peft.ExpertScores.load(path) of a file."
        )
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={shown(criterion)} must be one of {CRITERIA}.")
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate={shown(aggregate)} must be one of {AGGREGATES}.")
    if max_parameters is not None and p is not None:
        raise ValueError(
            f"p={shown(p)} and max_parameters={shown(max_parameters)} exclude each other: give one of them."
        )
    p = DEFAULT_P[criterion] if p is None else p
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= MAX_P:
        raise ValueError(
            f"p={shown(p)} must be 0 or more, as in p=0.2: the score that the selected experts of a layer reach "
            "together."
        )
    fewest = min(scores.num_experts.values())
    if not is_whole(min_experts) or min_experts > fewest:
        raise ValueError(f"min_experts={shown(min_experts)} must be between 0 and {fewest}, a whole number.")
    if not isinstance(normalize_scores, bool):
        raise ValueError(f"normalize_scores={shown(normalize_scores)} must be True or False.")
    rule = SelectionRule(p, criterion, aggregate, min_experts, normalize_scores)
    return _selected(scores, rule if max_parameters is None else _largest(scores, rule, max_parameters))


def _selected(scores: ExpertScores, rule: SelectionRule) -> ExpertSelection:
    return ExpertSelection(
        {str(layer): _prefix(scores.of(layer, rule.criterion, rule.aggregate), rule) for layer in scores.layers},
        num_experts={str(layer): count for layer, count in scores.num_experts.items()},
        expert_parameters={
            str(layer): own.expert_parameters
            for layer, own in scores.by_layer.items()
            if own.expert_parameters is not None
        },
        model_parameters=scores.model_parameters,
        rule=rule,
    )


def _largest(scores: ExpertScores, rule: SelectionRule, max_parameters: int) -> SelectionRule:
    """The rule with the largest p whose experts have no more parameters; counts of parameters grow with p."""
    if not is_whole(max_parameters) or any(own.expert_parameters is None for own in scores.by_layer.values()):
        known = all(own.expert_parameters is not None for own in scores.by_layer.values())
        unknown = "None, as the scores do not say how large an expert is"
        reason = "a whole number of parameters, 0 or more" if known else unknown
        raise ValueError(f"max_parameters={shown(max_parameters)} must be {reason}.")
    steps = {0.0}
    for layer in scores.layers:
        own_E = scores.of(layer, rule.criterion, rule.aggregate)
        mass = float(own_E.sum()) if rule.normalize_scores else 1.0
        steps.update((own_E / (mass or 1.0)).sort(descending=True).values.cumsum(0).tolist())
    candidates = [replace(rule, p=p) for p in sorted(steps)]
    least = _selected(scores, candidates[0]).num_parameters or 0
    if least > max_parameters:
        raise ValueError(
            f"max_parameters={max_parameters} is below the {least} of min_experts={rule.min_experts} in each layer."
        )
    low, high = 0, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        fits = (_selected(scores, candidates[middle]).num_parameters or 0) <= max_parameters
        low, high = (middle, high) if fits else (low, middle)
    return candidates[low]


def _prefix(scores_E: torch.Tensor, rule: SelectionRule) -> list[int]:
    """The experts of one layer."""
    mass = float(scores_E.sum())
    if rule.normalize_scores and mass > 0:
        scores_E = scores_E / mass
    ranked_E, order_E = scores_E.round(decimals=DECIMALS).sort(descending=True, stable=True)
    used = int((ranked_E > 0).sum())
    # Token scores sum to one by definition, but not quite where a file has rounded them.
    whole = 1.0 if rule.criterion == "token" or rule.normalize_scores else mass
    reached_E = scores_E[order_E].cumsum(0) >= rule.p - TOLERANCE
    if rule.p == 0:
        count = 0
    elif rule.p >= whole - TOLERANCE or not bool(reached_E.any()):
        count = used
    else:
        count = min(int(reached_E.long().argmax()) + 1, used)
    return order_E[: max(count, rule.min_experts)].tolist()


def _counts(layer: object, count: object, least: int) -> bool:
    """Whether an entry says how many of something a layer has."""
    return isinstance(layer, str) and layer_index(layer) is not None and type(count) is int and count >= least
