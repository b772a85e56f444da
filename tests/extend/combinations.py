"""Choices of scorer, gate, selector and expert kind that cover every pair of them that fits."""

from __future__ import annotations

import itertools

from moe_peft.extend import EXPERTS, GATES, LOSSES, ROUTERS, SCORERS, SELECTORS
from moe_peft.routers import router_gives, router_learns, router_needs

Choice = tuple[str, str, str, str]  # router, scorer, gate, experts


def fits(choice: Choice) -> bool:
    """Whether the experts give what the router needs."""
    router, scorer, gate, experts = choice
    return router_needs(router, scorer, gate) <= EXPERTS[experts].gives


def choices() -> list[Choice]:
    """A small set of choices in which every pair of registered parts that can stand together does."""
    whole = [(name, "linear", "softmax", kind) for name in ROUTERS.keys() - SELECTORS.keys() for kind in EXPERTS]
    every = [choice for choice in itertools.product(SELECTORS, SCORERS, GATES, EXPERTS) if fits(choice)]
    pairs_of = {choice: set(itertools.combinations(enumerate(choice), 2)) for choice in every}
    missing, chosen = set().union(*pairs_of.values()), []
    while missing:
        best = max(every, key=lambda choice: len(pairs_of[choice] & missing))
        chosen.append(best)
        missing -= pairs_of[best]
    return sorted(choice for choice in whole if fits(choice)) + chosen


def losses_for(choice: Choice) -> list[str]:
    """The losses that go with a router's decision."""
    router, scorer, gate, _ = choice
    if not router_learns(router, scorer, gate):
        return []
    return [name for name, loss in LOSSES.items() if loss.needs <= router_gives(router, scorer, gate)]
