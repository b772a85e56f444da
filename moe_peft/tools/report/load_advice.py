"""What the load of the experts means: who decides, who does too much or nothing, and how surely tokens choose."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .evidence import Advice, Evidence, names_of
from .measure import PlaceRouting
from .measures import effective_experts

COLLAPSED = 0.5  # of the gate mass in one expert's hands, of three or more
UNUSED = 0.01  # of the even share
UNDECIDED = 0.98  # of the largest entropy of a token's weights
FEW = 0.6  # of the experts, in effect


def advise_on_load(evidence: Evidence) -> list[Advice]:
    """Say what the load means.

    Args:
        evidence: The numbers.

    Returns:
        Findings in no order of weight; none where the load is as it should be.
    """
    own = evidence.routed
    found = [*_who_decides(evidence), *_collapsed(evidence, own), *_unused(evidence, own), *_too_many(evidence, own)]
    return [*found, *_undecided(own)]


def _who_decides(evidence: Evidence) -> list[Advice]:
    found = []
    constant = names_of(place for place in evidence.places if place.decides == "nobody")
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
    backbone = names_of(place for place in evidence.places if place.decides == "backbone")
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
            names_of(bad),
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
            f"Take fewer experts{evidence.now('num_experts')}, or raise the balance loss"
            f"{evidence.now('router_aux_loss_coef')}.",
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
            f"num_experts={needed} would do{evidence.now('num_experts')}, unless other data use the rest.",
            "num_experts" if evidence.has("num_experts") else None,
        )
    ]


def _undecided(own: Sequence[PlaceRouting]) -> list[Advice]:
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
            names_of(bad),
        )
    ]
