"""Turns the shared fields of a configuration into the parts of one layer."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import MoeConfig, RoutedParts
from ..experts import EXPERTS
from ..objective import Loss, RouterObjective
from ..routers import ROUTERS


def build_parts(
    config: MoeConfig,
    in_features: int,
    out_features: int,
    *,
    losses: Mapping[str, tuple[Loss, float]],
    experts: str = "low_rank",
    router_init_std: float | None = None,
) -> RoutedParts:
    """Build a router, a bank of experts and their losses.

    Args:
        config: Where the numbers come from.
        in_features: D, input width of the wrapped layer.
        out_features: O, its output width.
        losses: Name -> (loss, coefficient).
        experts: Name of the expert kind.
        router_init_std: Standard deviation of the router's initialisation; None takes the one of `nn.Linear`.
    """
    router_cls = ROUTERS[config.router]
    router = router_cls(
        in_features,
        config.num_experts,
        init_std=router_init_std,
        **{name: getattr(config, name) for name in router_cls.fields},
    )
    bank = EXPERTS[experts](
        in_features,
        out_features,
        num_experts=config.num_experts,
        r=config.r,
        scaling=config.scaling,
        lora_dropout=config.lora_dropout,
        init_weights=config.init_weights,
        experts_implementation=config.experts_implementation,
    )
    return RoutedParts(
        router=router, experts=bank, objective=RouterObjective(losses, scope=config.load_balancing_scope)
    )
