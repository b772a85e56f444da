"""A smaller adapter: the experts that matter most to a task, or several experts merged into one.

    prune    the `keep` experts of each place with the largest share of the weights, or of the requests, of the tokens,
             the largest change of the router's norm in training, or the largest scores that were given
    merge    every other expert is added to the kept one whose change is most alike, in proportion to their use:
             B A = sum_e u_e B_e A_e / sum_e u_e, truncated to the rank again

The change of the norm is that of Chowdhury et al. (arXiv 2405.16646): ||w_e|| after training less ||w_e|| before.
The share is measured on batches of the task, and so is what the smaller adapter loses; it is an approximation, and the
router's numbers for the kept experts stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .. import telemetry
from ..layers import RoutedLayer
from ..layers.router_norms import router_norms
from ..messages import shown
from ..telemetry.history import RoutingHistory
from ..telemetry.statistics import RoutingStatistics
from .checks import check_peft_model
from .compose import put_pair
from .measure import Batch, Comparison, Difference, checked_batches, evaluating, next_tokens
from .measured_card import add_measured
from .other_experts import check_new, deciding_places, only, routed_by_name, with_experts
from .stock_lora import Pair
from .truncate import cosine, truncated

# What counts as use -> the sum over tokens that it is a share of.
MEASURES = {"importance": "mass", "load": "requests"}
BY = (*MEASURES, "router_change", "scores")
MISSING = {
    "scores": "by='scores' needs scores: a dict from each place to a number for each of its experts.",
    "router_change": (
        "by='router_change' needs initial_norms, the lengths of the routers' vectors before training, which are "
        "random and in no adapter's file. Give the folder of a run with moe_peft.attach, whose history has them, or "
        "what moe_peft.tools.router_norms(model) returned before the first step; or choose by='importance'."
    ),
}


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

    def write_card(self, folder: str | Path) -> None:
        """Write into the card of a folder what was lost.

        Args:
            folder: Folder to which the smaller adapter was saved.

        Raises:
            ValueError: It holds no adapter.
        """
        fewest = min(map(len, self.kept.values()))
        how = "others merged into them" if any(len(own) > 1 for own in self._groups()) else "the others left out"
        says = (
            f"The adapter has {fewest} experts of a larger one at each place, {how}. What it loses against that one:"
        )
        add_measured(folder, "What fewer experts lose", says, self.difference.metrics())

    def _groups(self) -> list[list[int]]:
        return [group for groups in self.merged.values() for group in groups]


def prune_experts(
    model: PeftModel,
    new_name: str,
    keep: int,
    batches: Iterable[Batch],
    *,
    by: str = "importance",
    scores: Mapping[str, Sequence[float] | torch.Tensor] | None = None,
    initial_norms: Mapping[str, torch.Tensor] | str | Path | None = None,
    merge: bool = False,
    adapter_name: str = "default",
) -> SmallerAdapter:
    """Add an adapter with fewer experts at each place, chosen by what batches of a task use.

    Args:
        model: A causal language model with the adapter, which stays.
        new_name: Name of the smaller adapter, which becomes the active one.
        keep: Experts of each place.
        batches: Of the task: keyword arguments of the model.
        by: "importance", the share of the weights that go to an expert, "load", its share of the requests,
            "router_change", the growth of the router's vector for it since training began, or "scores".
        scores: Place -> (E,) numbers of a task's own, the largest kept; for by="scores". Places that follow the
            decision of another one have none.
        initial_norms: What `router_norms(model)` returned before training, or a folder with the history of the run,
            which `moe_peft.attach` writes; for by="router_change".
        merge: Whether the other experts are merged into the kept ones, by importance or load, instead of left out; for
            experts that are pairs.
        adapter_name: The adapter to make smaller.

    Returns:
        Which experts were kept, and what is lost.

    Raises:
        ValueError: There is no such adapter, keep is not below the number of experts, the experts are no pairs to
            merge, or what they are chosen by is not known. Nothing has been changed.
    """
    check_peft_model(model, "prune_experts")
    layers = routed_by_name(model, adapter_name)
    check_new(model, adapter_name, new_name)
    data = checked_batches(batches, "prune_experts")
    fewest = min(layer.experts[adapter_name].num_choices for layer in layers.values())
    if fewest == 1:
        raise ValueError(f"The adapter {shown(adapter_name)} has a layer with one expert, which cannot be left out.")
    if not isinstance(keep, int) or isinstance(keep, bool) or not 1 <= keep < fewest:
        raise ValueError(f"keep={shown(keep)} must be a whole number from 1 to {fewest - 1}.")
    if not isinstance(by, str) or by not in BY:
        raise ValueError(f"by={shown(by)} must be one of {[*BY]}.")
    given = _given(model, layers, adapter_name, by, scores, initial_norms)
    if merge and not all(_is_pairs(layer.experts[adapter_name]) for layer in layers.values()):
        raise ValueError("merge=True needs experts that are pairs of matrices. Leave merge out, which prunes.")
    with only(model, adapter_name):
        before, shares = _measured(model, data, by if by in MEASURES else next(iter(MEASURES)))
    deciding = deciding_places(layers, adapter_name)
    unused = [name for name, place in deciding.items() if place not in shares]
    if unused:
        raise ValueError(f"prune_experts: no batch reaches {shown(unused)}, so that its experts cannot be compared.")
    used = {name: shares[place] for name, place in deciding.items()}
    ranked = {name: given[place] for name, place in deciding.items()} if given else used
    kept = {name: sorted(own.argsort(descending=True, stable=True)[:keep].tolist()) for name, own in ranked.items()}
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


def _given(
    model: PeftModel,
    layers: Mapping[str, RoutedLayer],
    adapter_name: str,
    by: str,
    scores: Mapping[str, Any] | None,
    initial_norms: Mapping[str, torch.Tensor] | str | Path | None,
) -> dict[str, torch.Tensor]:
    """By place the (E,) numbers that need no batch; none where the experts are chosen by their use."""
    for name, value, own in (("scores", scores, "scores"), ("initial_norms", initial_norms, "router_change")):
        if value is None and by == own:
            raise ValueError(f"prune_experts: {MISSING[own]}")
        if value is not None and by != own:
            raise ValueError(f"prune_experts: {name} is for by={shown(own)} alone, and by={shown(by)}. Leave it out.")
    deciding = deciding_places(layers, adapter_name)
    counts = {deciding[name]: layer.experts[adapter_name].num_choices for name, layer in layers.items()}
    if by == "scores":
        return _checked(scores, counts, "scores")
    if by != "router_change":
        return {}
    start = _checked(_norms_of(initial_norms, adapter_name), counts, "initial_norms")
    now = router_norms(model, adapter_name)
    lacking = sorted(counts.keys() - now.keys())
    if lacking:
        raise ValueError(
            f"by='router_change': the routers at {shown(lacking)} have no vector for each expert whose length could "
            "have changed. Choose by='importance', or by='load'."
        )
    return {place: now[place] - own for place, own in start.items()}


def _norms_of(given: Any, adapter_name: str) -> Any:
    """Initial lengths by place, of a folder's history where one was named."""
    if not isinstance(given, (str, Path)):
        return given
    try:
        found = RoutingHistory.load(given).initial_norms
    except FileNotFoundError as error:
        raise ValueError(f"initial_norms={shown(str(given))}: {error} {MISSING['router_change']}") from error
    names = {key.rpartition("/")[2] for key in found}
    name = adapter_name if adapter_name in names or len(names) != 1 else names.pop()
    norms = {key.rpartition("/")[0]: own for key, own in found.items() if key.rpartition("/")[2] == name}
    if not norms:
        raise ValueError(
            f"initial_norms={shown(str(given))}: the run's history holds no lengths of the routers' vectors of the "
            f"adapter {shown(adapter_name)}. {MISSING['router_change']}"
        )
    return norms


def _checked(given: Any, counts: Mapping[str, int], name: str) -> dict[str, torch.Tensor]:
    """Numbers for each expert of each place, as (E,) float64."""
    if not isinstance(given, Mapping) or given.keys() != counts.keys():
        lacking = sorted(counts.keys() - set(given if isinstance(given, Mapping) else ()))
        raise ValueError(
            f"{name}={shown(given)} must be a dict from each of the {len(counts)} places to a number for each expert; "
            f"places without: {shown(lacking)}."
        )
    found = {}
    for place, count in counts.items():
        try:
            numbers_E = torch.as_tensor(given[place], dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            numbers_E = torch.full((1,), torch.nan)
        if numbers_E.shape != (count,) or not bool(numbers_E.isfinite().all()):
            raise ValueError(f"{name}[{shown(place)}]={shown(given[place])} must be {count} finite numbers.")
        found[place] = numbers_E
    return found


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
