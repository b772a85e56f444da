"""How far groups of texts are apart in the experts that they use, place by place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .measure import PlaceRouting
from .measures import divergence, known_mean, pair_divergences


def shares_by_group(place: PlaceRouting, groups: Iterable[str]) -> torch.Tensor:
    """(G, E) share of the gate mass that each expert gets in each group; groups without tokens are left out.

    Args:
        place: What was decided.
        groups: Names of the groups.
    """
    found = [own.importance for group in groups if (own := place.statistics(group)) is not None]
    return torch.stack(found) if found else torch.zeros(0, place.num_experts)


def pair_means(places: Sequence[PlaceRouting], groups: Sequence[str]) -> list[list[float]]:
    """Divergence of each pair of groups, mean over the places that both have reached.

    Args:
        places: What was measured.
        groups: Names of the groups.
    """
    total, count = torch.zeros(2, len(groups), len(groups), dtype=torch.float64)
    for own in places:
        there = torch.tensor([n for n, group in enumerate(groups) if own.statistics(group) is not None])
        if len(there):
            rows, columns = torch.meshgrid(there, there, indexing="ij")
            total[rows, columns] += pair_divergences(shares_by_group(own, groups))
            count[rows, columns] += 1
    return (total / count).tolist()


def chance(places: Iterable[PlaceRouting], groups: Iterable[str]) -> float:
    """What groups of the same texts would be apart: half of what the two halves of one group are, in the mean.

    A divergence by chance falls with the number of tokens, of which a half has half.

    Args:
        places: What was measured.
        groups: Names of the groups.

    Returns:
        NaN where every group has one batch only.
    """
    found, names = [], list(groups)
    for own in places:
        for group in names:
            halves = [s.importance for half in (0, 1) if (s := own.statistics(group, half)) is not None]
            if len(halves) == 2:
                found.append(divergence(torch.stack(halves)) / 2)
    return known_mean(found)
