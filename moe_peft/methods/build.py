"""Turns the shared fields of a configuration into the parts of one layer."""

from __future__ import annotations

from collections.abc import Mapping

from ..config.config import BACKBONE
from ..config.fields import MixtureConfig
from ..config.parts import RoutedParts
from ..experts import EXPERTS
from ..forward.objective import Loss, RouterObjective
from ..routers import ROUTERS
from ..types import Place


def build_parts(
    config: MixtureConfig,
    place: Place,
    *,
    losses: Mapping[str, tuple[Loss, float]],
    experts: str = "low_rank",
    router_init_std: float | None = None,
) -> RoutedParts:
    """Build a router, a bank of experts and their losses; without a router where the backbone routes.

    Args:
        config: Where the numbers come from.
        place: The module that the layer will wrap.
        losses: Name -> (loss, coefficient).
        experts: Name of the expert kind.
        router_init_std: Standard deviation of the router's initialisation; None takes the one of `nn.Linear`.
    """
    follows = config.router == BACKBONE
    num_experts = place.num_experts if follows else config.num_experts
    assert num_experts is not None
    experts_cls = EXPERTS[experts]
    bank = experts_cls(
        place.in_features,
        place.out_features,
        num_experts=num_experts,
        r=config.r,
        **{name: getattr(config, name) for name in experts_cls.fields},
    )
    if follows:
        return RoutedParts(experts=bank)
    router_cls = ROUTERS[config.router]
    router = router_cls(
        place.in_features,
        num_experts,
        init_std=router_init_std,
        **{name: getattr(config, name) for name in config.router_fields()},
    )
    return RoutedParts(
        router=router, experts=bank, objective=RouterObjective(losses, scope=config.load_balancing_scope)
    )
