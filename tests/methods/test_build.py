"""Shared fields become the parts that they name, with their numbers; a follower and the backbone bring no router."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_peft import LoraMoeConfig, PerftConfig, RoutedConfig, SiraConfig
from moe_peft.extend import EXPERTS, SELECTORS, Place, build_experts, build_parts, build_router

PLACE = Place("layers.0.q", 6, 4, num_experts=5)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_router_has_the_numbers_of_the_configuration(name):
    own = {"top_k": 2} if "top_k" in SELECTORS[name].fields else {}
    if name == "positive":
        own["gate"] = "relu"
    config = RoutedConfig(router=name, num_experts=3, routed_scaling_factor=1.5, expert_dropout=0.25, **own)
    router = build_router(config, 6, 3, init_std=0.0)
    assert isinstance(router.select, SELECTORS[name]) and router.weight.shape == (3 + router.select.extra_scores, 6)
    assert router.routed_scaling_factor == 1.5 and router.expert_dropout.p == 0.25 and not router.weight.any()


@pytest.mark.parametrize("name", sorted(EXPERTS.keys() & {"low_rank", "bottleneck"}))
def test_a_bank_has_the_widths_of_its_place_and_the_rank_of_the_configuration(name):
    bank = build_experts(RoutedConfig(experts=name, r=3), PLACE, 7, name)
    shapes = {key: tuple(tensor.shape) for key, tensor in bank.named_parameters()}
    assert bank.num_choices == 7 and isinstance(bank, EXPERTS[name])
    for key, begins in type(bank).shapes(7, 3).items():
        assert shapes[key][: len(begins)] == begins


def test_losses_without_weight_are_left_out_and_the_scope_is_the_configurations():
    config = LoraMoeConfig(num_experts=3, load_balancing_scope="micro_batch")
    parts = build_parts(config, PLACE, losses={"a": (lambda routing: routing.probs.sum(), 0.0)})
    assert not parts.objective and parts.objective.scope == "micro_batch"
    parts = build_parts(config, PLACE, losses={"a": (lambda routing: routing.probs.sum(), 0.5)})
    assert parts.objective.coefficients == {"a": 0.5}


def test_who_follows_another_decision_has_no_scores_and_no_losses_of_its_own():
    config = SiraConfig(num_experts=4)
    follower = build_parts(config, replace(PLACE, leader="layers.0.k", block="layers.0"), losses={})
    assert follower.router is not None and follower.router.reads == "block" and follower.objective is None
    assert not list(follower.router.parameters())
    follows = build_parts(PerftConfig(variant="E"), PLACE, losses={})
    assert follows.router is None and follows.experts.num_choices == PLACE.num_experts
