"""Which experts of a backbone to train for a task: the fewest whose scores add up to p, layer by layer.

    E_s = the smallest prefix of the experts, in descending order of their scores, with sum_{i in E_s} R_i >= p

R is the gate or the token score of `moe_peft.score_experts` (Wang et al., 2024, arXiv 2407.01906, section 3). Each
layer is selected on its own, by its scores as they are; the authors' published configurations follow this rule, while
their published script first divides by the sum over layers, which gives other experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..messages import shown
from .files import is_whole
from .scores import AGGREGATES, CRITERIA, ExpertScores
from .selected import ExpertSelection, SelectionRule

DEFAULT_P = {"token": 0.2, "gate": 0.1}
# Scores that differ by less are the same number in another order of summation.
DECIMALS = 12
TOLERANCE = 1e-9
MAX_P = 1e30


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
