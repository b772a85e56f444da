"""What the numbers of a routing mean, and what to do: each piece with the number behind it and the field to change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .curves import Curves
from .measure import PlaceRouting
from .measures import effective_experts

Tone = Literal["good", "note", "act"]

COLLAPSED = 0.5  # of the gate mass in one expert's hands, of three or more
UNUSED = 0.01  # of the even share
UNDECIDED = 0.98  # of the largest entropy of a token's weights
FEW = 0.6  # of the experts, in effect
ALIKE = 0.95  # cosine
DROPPED = 0.05  # of the requests
MOVING = 0.02  # of the gate mass between the last two readings
SPECIALISED, ABOVE_CHANCE = 0.05, 3.0  # divergence, and times that of two halves of one group


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
        kind: One word: "collapsed", "unused", "too_many", "undecided", "alike", "dropped", "moving", "specialised",
            "not_specialised", "no_router", "backbone" or "healthy".
        tone: Whether it is good, a note, or something to act upon.
        title: A few words.
        evidence: The number behind it.
        action: What to do.
        field: The setting to change; None where there is nothing to change.
        places: Names of the places that it is about; empty for all.
    """

    kind: str
    tone: Tone
    title: str
    evidence: str
    action: str
    field: str | None = None
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What advice is made of.

    Attributes:
        places: What was measured.
        divergence: Of the groups, mean over the places; NaN for one group.
        chance: What chance gives for it; NaN where that is not known.
        similarity: Place -> (E, E) cosines.
        curves: Of the training run, if known.
        config: The adapter's configuration, if any.
    """

    places: Sequence[PlaceRouting]
    divergence: float = math.nan
    chance: float = math.nan
    similarity: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    curves: Curves | None = None
    config: Any = None

    def has(self, field: str) -> bool:
        """Whether the configuration has a field."""
        return self.config is not None and any(own.name == field for own in dataclasses.fields(self.config))

    def set_to(self, field: str) -> str:
        """A field with its value, as it would be written."""
        return f"{field}={getattr(self.config, field)}"


def advise(evidence: Evidence) -> list[Advice]:
    """Say what the numbers mean.

    Args:
        evidence: The numbers.

    Returns:
        What to act upon first, then notes, then what is good; "healthy" where there is nothing else.
    """
    own = [place for place in evidence.places if place.decides == "router" and place.num_experts > 1]
    found = [*_who_decides(evidence), *_collapsed(evidence, own), *_unused(evidence, own), *_too_many(evidence, own)]
    found += [*_undecided(evidence, own), *_alike(evidence), *_dropped(evidence), *_moving(evidence)]
    found += _groups(evidence)
    if own and not any(advice.tone == "act" for advice in found):
        even = sum(float(place.total.load_entropy) for place in own) / len(own)
        found.append(
            Advice("healthy", "good", "The experts are in use", f"evenness {even:.2f} of 1", "Nothing to change.")
        )
    return sorted(found, key=lambda advice: ("act", "note", "good").index(advice.tone))


def _who_decides(evidence: Evidence) -> list[Advice]:
    found = []
    constant = _names(place for place in evidence.places if place.decides == "nobody")
    if constant:
        found.append(
            Advice(
                "no_router",
                "note",
                "No router decides",
                f"at {len(constant)} of {len(evidence.places)} places every token gets the same weights",
                "The adapter has no router there, or one that has not learned to tell tokens apart. Load and entropy "
                "say nothing about the data.",
                places=constant,
            )
        )
    backbone = _names(place for place in evidence.places if place.decides == "backbone")
    if backbone:
        used = [effective_experts(p.total.importance) for p in evidence.places if p.decides == "backbone"]
        total = [p.num_experts for p in evidence.places if p.decides == "backbone"]
        found.append(
            Advice(
                "backbone",
                "note",
                "The backbone's router decides",
                f"these texts use {sum(used) / len(used):.1f} of {sum(total) / len(total):.0f} experts in effect",
                "The adapter follows it and cannot change it. Where few experts carry the texts, training these alone "
                "is enough: moe-peft select-experts finds them.",
                "experts" if evidence.has("experts") else None,
                backbone,
            )
        )
    return found


def _collapsed(evidence: Evidence, own: Sequence[PlaceRouting]) -> list[Advice]:
    bad = [p for p in own if p.num_experts > 2 and float(p.total.importance.max()) > COLLAPSED]
    if not bad:
        return []
    worst = max(bad, key=lambda place: float(place.total.importance.max()))
    expert, share = int(worst.total.importance.argmax()), float(worst.total.importance.max())
    field, action = _balance(evidence)
    return [
        Advice(
            "collapsed",
            "act",
            f"Collapsed at {len(bad)} of {len(own)} places",
            f"expert {expert} of {worst.place} has {share:.0%} of the gate mass; even would be "
            f"{1 / worst.num_experts:.0%}",
            action,
            field,
            _names(bad),
        )
    ]


def _balance(evidence: Evidence) -> tuple[str, str]:
    if evidence.has("router_aux_loss_coef"):
        now = evidence.set_to("router_aux_loss_coef")
        return "router_aux_loss_coef", f"Raise the weight of the balance loss (it is {now}), or lower router_lr."
    return "router_lr", "Lower the routers' learning rate (router_lr of moe_peft.attach)."


def _unused(evidence: Evidence, own: Sequence[PlaceRouting]) -> list[Advice]:
    counts = {p.place: int((p.total.importance * p.num_experts < UNUSED).sum()) for p in own}
    bad = {place: count for place, count in counts.items() if count}
    if not bad:
        return []
    total, unused = sum(p.num_experts for p in own), sum(bad.values())
    return [
        Advice(
            "unused",
            "act" if unused > total / 10 else "note",
            f"{unused} of {total} experts are next to unused",
            f"each has less than {UNUSED:.0%} of an even share of the gate mass, at {len(bad)} of {len(own)} places",
            f"Take fewer experts{_now(evidence, 'num_experts')}, or raise the balance loss"
            f"{_now(evidence, 'router_aux_loss_coef')}.",
            "num_experts" if evidence.has("num_experts") else None,
            tuple(bad),
        )
    ]


def _too_many(evidence: Evidence, own: Sequence[PlaceRouting]) -> list[Advice]:
    shares = [effective_experts(p.total.importance) / p.num_experts for p in own]
    if not shares or sum(shares) / len(shares) >= FEW:
        return []
    needed = max(math.ceil(effective_experts(p.total.importance)) for p in own)
    used = sum(effective_experts(p.total.importance) for p in own) / len(own)
    most = max(p.num_experts for p in own)
    if needed >= most:
        return []
    return [
        Advice(
            "too_many",
            "note",
            "More experts than these texts ask for",
            f"{used:.1f} of {most} experts in effect (exp of the entropy), at most {needed} at any place",
            f"num_experts={needed} would do{_now(evidence, 'num_experts')}, unless other data use the rest.",
            "num_experts" if evidence.has("num_experts") else None,
        )
    ]


def _undecided(evidence: Evidence, own: Sequence[PlaceRouting]) -> list[Advice]:
    # A router that may select but one or two cannot be even, so this is about those that mix all.
    bad = [p for p in own if p.token_entropy > UNDECIDED]
    if len(bad) <= len(own) / 2 or not own:
        return []
    value = sum(p.token_entropy for p in bad) / len(bad)
    return [
        Advice(
            "undecided",
            "act",
            "The routers hardly decide",
            f"a token's weights have {value:.1%} of the largest entropy, at {len(bad)} of {len(own)} places",
            "Train longer, or raise router_lr (of moe_peft.attach; --moe_router_lr).",
            "router_lr",
            _names(bad),
        )
    ]


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
            f"Take fewer experts{_now(evidence, 'num_experts')}, or let them see other data (groups, fewer a token).",
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
            f"Raise the capacity{_now(evidence, 'capacity_factor')}, or balance more.",
            "capacity_factor" if evidence.has("capacity_factor") else None,
            _names(bad),
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
            f"{way}{_now(evidence, 'router_aux_loss_coef')}. Where nothing specialises, a plain LoRA may do as well.",
            next((own for own in ("expert_groups", "router_aux_loss_coef") if evidence.has(own)), None),
        )
    ]


def _now(evidence: Evidence, field: str) -> str:
    return f" (it is {evidence.set_to(field)})" if evidence.has(field) else ""


def _above(matrix: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(matrix, dtype=torch.bool).triu(1)


def _names(places: Any) -> tuple[str, ...]:
    return tuple(place.place for place in places)
