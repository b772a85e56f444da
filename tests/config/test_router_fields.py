"""Fields of routers: those that the chosen router takes are checked together, the others are left alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moe_peft import MoloraConfig, RoutedConfig, SiraConfig


@pytest.mark.parametrize(
    ("router", "fields"),
    [
        ("dense", {"top_k": 2}),
        ("dense", {"norm_topk_prob": True}),
        ("dense", {"capacity_factor": 1.0}),
        ("top_k", {"capacity_factor": 1.0}),
        ("top_k", {"capacity_order": "choice"}),
    ],
)
def test_field_that_the_router_does_not_use_is_refused(router, fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name}=.* must be left at .*: the '{router}' router does not use it"):
        RoutedConfig(router=router, **fields)


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("config", [SiraConfig, RoutedConfig, MoloraConfig])
def test_top_k_outside_of_the_experts_is_refused(config, top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} must be between 1 and num_experts=4"):
        config(num_experts=4, top_k=top_k)


def test_sparse_router_needs_top_k():
    with pytest.raises(ValueError, match="top_k=None must be set for the 'capacity' router"):
        SiraConfig(top_k=None)


def test_a_field_that_the_router_does_not_use_is_left_at_the_default_of_its_group_not_of_the_type():
    @dataclass
    class Rescaled(RoutedConfig):
        norm_topk_prob: bool = True

    Rescaled(router="dense", norm_topk_prob=False)
    with pytest.raises(ValueError, match="norm_topk_prob=True must be left at False: the 'dense' router"):
        Rescaled(router="dense")
    Rescaled(router="top_k", top_k=2)
