"""Turns the shared fields of a configuration into the parts of one layer."""

from __future__ import annotations

from collections.abc import Mapping

from ..config.config import BACKBONE
from ..config.fields import MixtureConfig
from ..config.pair_fields import LowRankConfig
from ..config.parts import RoutedParts
from ..config.router_fields import RouterConfig
from ..experts import DEFAULT_EXPERTS, EXPERTS, Experts
from ..forward.objective import Loss, RouterObjective
from ..options import option_values
from ..place import Place
from ..routers import FollowingRouter, Router, make_router


def build_router(config: RouterConfig, in_features: int, num_experts: int, *, init_std: float | None = None) -> Router:
    """Build the router that a configuration names.

    Args:
        config: Where names and numbers come from.
        in_features: Width of what the router reads.
        num_experts: Experts that it decides among.
        init_std: Standard deviation of its initialisation; None takes the scorer's own.
    """
    return make_router(
        in_features,
        num_experts,
        router=config.router,
        scorer=config.scorer,
        gate=config.gate,
        init_std=init_std,
        values={name: getattr(config, name) for name in config.router_fields()},
        args=config.router_args,
    )


def build_experts(config: LowRankConfig, place: Place, num_experts: int, experts: str = DEFAULT_EXPERTS) -> Experts:
    """Build a bank of experts.

    Args:
        config: Where the numbers come from.
        place: The module that the layer will wrap.
        num_experts: E.
        experts: Name of the expert kind.
    """
    kind = EXPERTS[experts]
    return kind(
        place.in_features,
        place.out_features,
        num_experts=num_experts,
        r=config.r,
        **{name: getattr(config, name) for name in kind.fields},
        **option_values(kind, config.experts_args),
        **kind.sizes_of(place),
    )


def build_parts(
    config: MixtureConfig,
    place: Place,
    *,
    losses: Mapping[str, tuple[Loss, float]],
    experts: str = DEFAULT_EXPERTS,
    router_init_std: float | None = None,
) -> RoutedParts:
    """Build a router, a bank of experts and their losses; without a router where the backbone routes.

    Args:
        config: Where the numbers come from.
        place: The module that the layer will wrap.
        losses: Name -> (loss, coefficient).
        experts: Name of the expert kind.
        router_init_std: Standard deviation of the router's initialisation; None takes the scorer's own.
    """
    follows = config.router == BACKBONE
    num_experts = place.num_experts if follows else config.num_experts
    assert num_experts is not None
    bank = build_experts(config, place, num_experts, experts)
    if follows:
        return RoutedParts(experts=bank)
    if place.leader is not None:
        return RoutedParts(experts=bank, router=FollowingRouter(place.in_features, bank.num_choices))
    router = build_router(config, place.in_features, bank.num_choices, init_std=router_init_std)
    if place.layer_index is not None and place.num_layers is not None:
        router.stands_in(place.layer_index, place.num_layers)
    if router.reads == "activations":
        bank.even_out()
    return RoutedParts(
        router=router, experts=bank, objective=RouterObjective(losses, scope=config.load_balancing_scope)
    )
