"""Each piece of advice comes with its number, names a field that the configuration has, and only where it holds."""

from __future__ import annotations

import math

import torch

import moe_peft
from moe_peft.tools.report.advice import advise
from moe_peft.tools.report.curves import curves
from moe_peft.tools.report.evidence import Evidence
from moe_peft.tools.report.measure import PlaceRouting

CONFIG = moe_peft.SiraConfig(task_type="CAUSAL_LM", num_experts=4, top_k=2)


def place(mass, *, name="layers.0.up", dropped=None, entropy=0.3, backbone=False, spread=1.0) -> PlaceRouting:
    mass = torch.tensor(mass, dtype=torch.float64)
    sums = [mass.clone(), mass, mass.sum(), mass.sum() / 2]
    sums += [] if dropped is None else [torch.tensor(dropped)]
    own = PlaceRouting(name, "default", len(mass), follows_backbone=backbone, dense=False)
    own.sums["all", 0], own.entropies["all", 0] = sums, entropy * float(mass.sum())
    own.lowest, own.highest = torch.zeros(len(mass)), torch.full((len(mass),), spread)
    return own


def kinds(*places, **fields) -> dict:
    return {own.kind: own for own in advise(Evidence(places, config=CONFIG, **fields))}


def test_experts_that_are_used_need_nothing():
    found = kinds(place([5, 4, 6, 5]))
    assert set(found) == {"healthy"} and found["healthy"].tone == "good"


def test_a_capacity_that_drops_much_is_named_with_its_field():
    found = kinds(place([5, 5, 5, 5], dropped=4.0))["dropped"]
    assert "20% of the requests" in found.evidence and found.field == "capacity_factor"
    assert f"capacity_factor={CONFIG.capacity_factor}" in found.action


def test_near_copies_are_told_from_experts_that_differ():
    alike = torch.tensor([[1.0, 0.99, 0.1], [0.99, 1.0, 0.2], [0.1, 0.2, 1.0]])
    found = kinds(place([5, 5, 5]), similarity={"layers.0.up": alike})
    assert "1 of 3 pairs" in found["alike"].title and "0.99" in found["alike"].evidence
    assert "alike" not in kinds(place([5, 5, 5]), similarity={"layers.0.up": torch.eye(3)})


def test_groups_count_as_apart_only_beyond_what_chance_gives():
    even = place([5, 5, 5, 5])
    assert "specialised" in kinds(even, divergence=0.3, chance=0.02)
    assert "not_specialised" in kinds(even, divergence=0.3, chance=0.2)
    assert "not_specialised" in kinds(even, divergence=0.01, chance=0.0)
    assert not {"specialised", "not_specialised"} & kinds(even, divergence=math.nan).keys()


def test_a_routing_that_moves_at_the_end_is_named():
    still = torch.tensor([[0.5, 0.5]] * 3)
    moving = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.8, 0.2]])
    found = kinds(place([5, 5]), curves=curves([1, 2, 3], [moving]))
    assert "30.0% of the gate mass" in found["moving"].evidence
    assert "moving" not in kinds(place([5, 5]), curves=curves([1, 2, 3], [still]))


def test_what_to_act_upon_comes_first():
    found = advise(Evidence([place([90, 5, 3, 2]), place([5, 5, 5, 5], spread=0.0)], divergence=0.5, chance=0.0))
    order = [("act", "note", "good").index(own.tone) for own in found]
    assert order == sorted(order) and order[0] == 0
    assert all(own.field in (None, "router_lr") for own in found)  # there is no configuration to name fields of
