"""Choices of router, scorer, gate and expert kind that leave out no part, no pair or no triple of them that fits."""

from __future__ import annotations

import heapq
import itertools

from moe_peft.extend import EXPERTS, GATES, LOSSES, ROUTERS, SCORERS, SELECTORS
from moe_peft.routers import lets_nothing_pass, router_gives, router_learns, router_needs

Choice = tuple[str, str, str, str]  # router, scorer, gate, experts
DEFAULTS = ("top_k", "linear", "softmax", "low_rank")


def fits(choice: Choice) -> bool:
    """Whether the experts give what the router needs, and its gate lets some of the scores pass."""
    router, scorer, gate, experts = choice
    dead = lets_nothing_pass(SCORERS[scorer], GATES[gate])
    return not dead and router_needs(router, scorer, gate) <= EXPERTS[experts].gives


def fitting() -> list[Choice]:
    """All choices that fit and act anywhere, those with most of the usual parts first.

    Whole routers have their own scorer and gate.
    """
    kinds = [name for name, kind in EXPERTS.items() if kind.placement is None]
    whole = itertools.product(sorted(ROUTERS.keys() - SELECTORS.keys()), ["linear"], ["softmax"], kinds)
    every = [*itertools.product(SELECTORS, SCORERS, GATES, kinds), *whole]
    return sorted(filter(fits, every), key=lambda choice: -len(set(choice) & set(DEFAULTS)))


def covering(strength: int) -> list[Choice]:
    """A small set of choices with every part (1), every pair (2) or every triple (3) of parts that can stand together.

    Every loss goes with one of them.

    Args:
        strength: How many parts are looked at together.
    """
    every = fitting()
    groups_of = {
        choice: {*itertools.combinations(enumerate(choice), strength), *losses_for(choice)} for choice in every
    }
    missing, chosen = set().union(*groups_of.values()), []
    # What a choice adds can only shrink, so a choice whose entry is still true is the best of all.
    heap = [(-len(groups_of[choice]), rank, choice) for rank, choice in enumerate(every)]
    heapq.heapify(heap)
    while missing:
        promised, rank, choice = heapq.heappop(heap)
        added = len(groups_of[choice] & missing)
        if added == -promised:
            chosen.append(choice)
            missing -= groups_of[choice]
        elif added:
            heapq.heappush(heap, (-added, rank, choice))
    return chosen


def placed() -> list[Choice]:
    """A choice for each kind of experts that acts in places of one kind alone."""
    return [(*DEFAULTS[:3], name) for name, kind in EXPERTS.items() if kind.placement is not None]


def losses_for(choice: Choice) -> list[str]:
    """The losses that go with a router's decision."""
    router, scorer, gate, _ = choice
    if not router_learns(router, scorer, gate):
        return []
    normalised = router not in SELECTORS or GATES[gate].sums_to_one
    fitting = [name for name, loss in LOSSES.items() if normalised or not loss.of_softmax]
    return [name for name in fitting if LOSSES[name].needs <= router_gives(router, scorer, gate)]
