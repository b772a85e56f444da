"""What the numbers of a routing mean, and what to do: each piece with the number behind it and the field to change."""

from __future__ import annotations

import math

import torch

from .evidence import Advice, Evidence, names_of
from .load_advice import advise_on_load

ALIKE = 0.95  # cosine
DROPPED = 0.05  # of the requests
MOVING = 0.02  # of the gate mass between the last two readings
SPECIALISED, ABOVE_CHANCE = 0.05, 3.0  # divergence, and times that of two halves of one group


def advise(evidence: Evidence) -> list[Advice]:
    """Say what the numbers mean.

    Args:
        evidence: The numbers.

    Returns:
        What to act upon first, then notes, then what is good; "healthy" where there is nothing else.
    """
    own = evidence.routed
    found = [*advise_on_load(evidence), *_alike(evidence), *_dropped(evidence), *_moving(evidence), *_groups(evidence)]
    if own and not any(advice.tone == "act" for advice in found):
        even = sum(float(place.total.load_entropy) for place in own) / len(own)
        found.append(
            Advice("healthy", "good", "The experts are in use", f"evenness {even:.2f} of 1", "Nothing to change.")
        )
    return sorted(found, key=lambda advice: ("act", "note", "good").index(advice.tone))


def _alike(evidence: Evidence) -> list[Advice]:
    pairs = [(float(v), place) for place, m in evidence.similarity.items() for v in m[_above(m)] if float(v) > ALIKE]
    total = sum(int((~m[_above(m)].isnan()).sum()) for m in evidence.similarity.values())
    if not pairs:
        return []
    value, place = max(pairs)
    return [
        Advice(
            "alike",
            "act" if len(pairs) > total / 4 else "note",
            f"{len(pairs)} of {total} pairs of experts are near copies",
            f"cosine of what they add up to {value:.2f}, at {place}",
            f"Take fewer experts{evidence.now('num_experts')}, or let them see other data (groups, fewer a token).",
            "num_experts" if evidence.has("num_experts") else None,
            tuple(sorted({place for _, place in pairs})),
        )
    ]


def _dropped(evidence: Evidence) -> list[Advice]:
    bad = [place for place in evidence.places if float(place.total.drop_rate) > DROPPED]
    if not bad:
        return []
    worst = max(float(place.total.drop_rate) for place in bad)
    return [
        Advice(
            "dropped",
            "act",
            "The capacity is too small",
            f"up to {worst:.0%} of the requests found their expert full",
            f"Raise the capacity{evidence.now('capacity_factor')}, or balance more.",
            "capacity_factor" if evidence.has("capacity_factor") else None,
            names_of(bad),
        )
    ]


def _moving(evidence: Evidence) -> list[Advice]:
    curve = evidence.curves
    if curve is None or len(curve.steps) < 3 or not curve.moved[-1] > MOVING:
        return []
    return [
        Advice(
            "moving",
            "note",
            "The routing was still moving when training ended",
            f"{curve.moved[-1]:.1%} of the gate mass went to other experts between the last two readings (steps "
            f"{curve.steps[-2]} and {curve.steps[-1]})",
            "Train longer, or let the learning rate fall towards the end. Readings of few tokens move by chance too.",
            "max_steps",
        )
    ]


def _groups(evidence: Evidence) -> list[Advice]:
    value, chance = evidence.divergence, evidence.chance
    if math.isnan(value):
        return []
    by_chance = "" if math.isnan(chance) else f"; chance gives {chance:.3f}"
    number = f"divergence of the groups {value:.3f} of 1{by_chance}"
    if value > SPECIALISED and (math.isnan(chance) or value > ABOVE_CHANCE * chance):
        return [
            Advice(
                "specialised",
                "good",
                "Experts serve different groups",
                number,
                "The routing tells the groups apart: keep the experts, and look below which serves which.",
            )
        ]
    way = "Give expert_groups, or balance less" if evidence.has("expert_groups") else "Balance less"
    return [
        Advice(
            "not_specialised",
            "note",
            "All groups use the experts alike",
            number,
            f"{way}{evidence.now('router_aux_loss_coef')}. Where nothing specialises, a plain LoRA may do as well.",
            next((own for own in ("expert_groups", "router_aux_loss_coef") if evidence.has(own)), None),
        )
    ]


def _above(matrix: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(matrix, dtype=torch.bool).triu(1)
