"""Selections of several tasks as one: the experts of any, of all, or of the most of them."""

from __future__ import annotations

from collections.abc import Iterable

from ..messages import shown
from .selected import ExpertSelection

WAYS = ("any", "all", "most")


def join_selections(selections: Iterable[ExpertSelection], how: str = "any") -> ExpertSelection:
    """Join selections of one backbone, to train one adapter for several tasks.

    Args:
        selections: One for each task, as `select_experts` returns them.
        how: "any" takes the experts that a task selects, "all" those that every task does, "most" those that more than
            half of them do.

    Returns:
        The selection; the experts of a layer are in the order of how many tasks select them, then of their ids. A task
        that trains the experts of all tokens makes the joined one train them too.

    Raises:
        ValueError: There is none, or they are of different backbones.
    """
    found = list(selections) if isinstance(selections, Iterable) else [selections]
    if not found or not all(isinstance(own, ExpertSelection) for own in found):
        raise ValueError(f"selections={shown(found)} must be a list of one or more of what select_experts returns.")
    if how not in WAYS:
        raise ValueError(f"how={shown(how)} must be one of {WAYS}.")
    sizes: dict[str, int] = {}
    for own in found:
        for layer, count in own.num_experts.items():
            if sizes.setdefault(layer, count) != count:
                raise ValueError(
                    f"Layer {layer} has {sizes[layer]} experts in one selection and {count} in another: they are of "
                    "different backbones. Join selections of one."
                )
    least = {"any": 1, "all": len(found), "most": len(found) // 2 + 1}[how]
    layers = sorted({layer for own in found for layer in own.experts}, key=int)
    return ExpertSelection(
        {layer: _chosen([own.experts.get(layer, []) for own in found], least) for layer in layers},
        shared_experts=any(own.shared_experts for own in found),
        num_experts=sizes,
        expert_parameters={layer: count for own in found for layer, count in own.expert_parameters.items()},
        model_parameters=next((own.model_parameters for own in found if own.model_parameters is not None), None),
    )


def _chosen(by_task: list[list[int]], least: int) -> list[int]:
    votes: dict[int, int] = {}
    for ids in by_task:
        for expert in ids:
            votes[expert] = votes.get(expert, 0) + 1
    return sorted((expert for expert, count in votes.items() if count >= least), key=lambda own: (-votes[own], own))
