"""A smaller adapter: the experts that a task uses most, or several experts merged into one.

    prune    the `keep` experts of each place with the largest share of the weights, or of the requests, of the tokens
    merge    every other expert is added to the kept one whose change is most alike, in proportion to their use:
             B A = sum_e u_e B_e A_e / sum_e u_e, truncated to the rank again

The share is measured on batches of the task, and so is what the smaller adapter loses; it is an approximation, and the
router's numbers for the kept experts stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from .. import telemetry
from ..messages import shown
from ..telemetry.statistics import RoutingStatistics
from .checks import check_peft_model
from .compose import put_pair
from .measure import Batch, Comparison, Difference, checked_batches, evaluating, next_tokens
from .other_experts import check_new, only, routed_by_name, with_experts
from .stock_lora import Pair
from .truncate import cosine, truncated

# What counts as use -> the sum over tokens that it is a share of.
MEASURES = {"importance": "mass", "load": "requests"}


@dataclass(frozen=True)
class SmallerAdapter:
    """What was made.

    Attributes:
        kept: Full name of a layer -> numbers of the kept experts in the old adapter, ascending.
        merged: Full name of a layer -> for each kept expert the numbers of those in it; only itself after pruning.
        difference: What is lost on the batches.
    """

    kept: dict[str, list[int]]
    merged: dict[str, list[list[int]]]
    difference: Difference


def prune_experts(
    model: PeftModel,
    new_name: str,
    keep: int,
    batches: Iterable[Batch],
    *,
    by: str = "importance",
    merge: bool = False,
    adapter_name: str = "default",
) -> SmallerAdapter:
    """Add an adapter with fewer experts at each place, chosen by what batches of a task use.

    Args:
        model: A causal language model with the adapter, which stays.
        new_name: Name of the smaller adapter, which becomes the active one.
        keep: Experts of each place.
        batches: Of the task: keyword arguments of the model.
        by: "importance", the share of the weights that go to an expert, or "load", its share of the requests.
        merge: Whether the other experts are merged into the kept ones instead of left out; for experts that are pairs.
        adapter_name: The adapter to make smaller.

    Returns:
        Which experts were kept, and what is lost.

    Raises:
        ValueError: There is no such adapter, keep is not below the number of experts, or the experts are no pairs to
            merge. Nothing has been changed.
    """
    check_peft_model(model, "prune_experts")
    layers = routed_by_name(model, adapter_name)
    check_new(model, adapter_name, new_name)
    data = checked_batches(batches, "prune_experts")
    fewest = min(layer.experts[adapter_name].num_choices for layer in layers.values())
    if not isinstance(keep, int) or isinstance(keep, bool) or not 1 <= keep < fewest:
        raise ValueError(f"keep={shown(keep)} must be a whole number from 1 to {fewest - 1}.")
    if by not in MEASURES:
        raise ValueError(f"by={shown(by)} must be one of {[*MEASURES]}.")
    if merge and not all(_is_pairs(layer.experts[adapter_name]) for layer in layers.values()):
        raise ValueError("merge=True needs experts that are pairs of matrices. Leave merge out, which prunes.")
    with only(model, adapter_name):
        before, shares = _measured(model, data, by)
    unused = [name for name, layer in layers.items() if layer.place not in shares]
    if unused:
        raise ValueError(f"prune_experts: no batch reaches {shown(unused)}, so that its experts cannot be compared.")
    used = {name: shares[layer.place] for name, layer in layers.items()}
    kept = {name: sorted(own.argsort(descending=True, stable=True)[:keep].tolist()) for name, own in used.items()}
    with_experts(model, adapter_name, new_name, kept)
    merged = {name: [[expert] for expert in ids] for name, ids in kept.items()}
    if merge:
        for name, layer in layers.items():
            merged[name] = _merge(layer, adapter_name, new_name, kept[name], used[name])
    comparison = Comparison()
    with evaluating(model):
        for batch, (logs, labels) in zip(data, before, strict=True):
            comparison.add(logs, next_tokens(model, batch)[0], labels)
    return SmallerAdapter(kept, merged, comparison.result())


def _is_pairs(bank: Any) -> bool:
    names = {name for name, _ in bank.named_parameters()}
    return names == {"A", "B"} and bank.A.dim() == bank.B.dim() == 3 and len(bank.A) == len(bank.B) == bank.num_choices


def _measured(model: PeftModel, batches: list[Batch], by: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What the model says about the batches, and by place the (E,) share of each expert."""
    said, sums = [], dict[str, torch.Tensor]()
    with evaluating(model):
        for batch in batches:
            with telemetry.record(model) as routings:
                said.append(next_tokens(model, batch))
            for place, made in routings.items():
                for routing in made:
                    own: torch.Tensor = getattr(RoutingStatistics.of(routing), MEASURES[by])
                    sums[place] = sums.get(place, torch.zeros(len(own), dtype=torch.float64)) + own.double().cpu()
    return said, sums


@torch.no_grad()
def _merge(layer: Any, old: str, new: str, kept: list[int], used_E: torch.Tensor) -> list[list[int]]:
    """Fill a place's kept experts with what is merged into each; the groups."""
    source, target = layer.experts[old], layer.experts[new]
    pairs = [(source.A[e].float(), source.B[e].T.float()) for e in range(source.num_choices)]
    groups = [[expert] for expert in kept]
    for expert in range(len(pairs)):
        if expert not in kept:
            alike = [cosine(pairs[expert], pairs[center]) for center in kept]
            groups[alike.index(max(alike))].append(expert)
    for number, group in enumerate(groups):
        total = float(used_E[group].sum())
        if len(group) > 1 and total > 0:
            A_RD = torch.cat([pairs[expert][0] for expert in group])
            B_OR = torch.cat([pairs[expert][1] * float(used_E[expert]) / total for expert in group], dim=1)
            A, B, _ = truncated(A_RD, B_OR, target.A.shape[1])
            put_pair(target, number, Pair(A, B * target.scaling))
    return groups
