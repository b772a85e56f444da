"""Router losses by name: classes whose instances, called on a `Routing`, return an unscaled 0-d float32 tensor."""

from __future__ import annotations

from ..registries import Registry
from ..types import RouterLoss
from .active_l1 import ActiveL1
from .certainty_balance import CertaintyBalance
from .entropy_balance import EntropyBalance
from .expert_clusters import ExpertClusters
from .importance import Importance, importance
from .load_balancing import GShardLoadBalancing, LoadBalancing, gshard_load_balancing, load_balancing
from .localized_balancing import LocalizedBalancing
from .null_load_balancing import NullLoadBalancing
from .router_distillation import RouterDistillation
from .sparsity_bound import SparsityBound
from .token_entropy import TokenEntropy
from .z_loss import ZLoss, z_loss

LOSSES: dict[str, type[RouterLoss]] = Registry(
    "LOSSES",
    RouterLoss,
    {
        "load_balancing": LoadBalancing,
        "gshard_load_balancing": GShardLoadBalancing,
        "importance": Importance,
        "localized_balancing": LocalizedBalancing,
        "z_loss": ZLoss,
        "null_load_balancing": NullLoadBalancing,
        "active_l1": ActiveL1,
        "token_entropy": TokenEntropy,
        "sparsity_bound": SparsityBound,
        "entropy_balance": EntropyBalance,
        "certainty_balance": CertaintyBalance,
        "expert_clusters": ExpertClusters,
        "router_distillation": RouterDistillation,
    },
)

__all__ = [
    "LOSSES",
    "GShardLoadBalancing",
    "Importance",
    "LoadBalancing",
    "LocalizedBalancing",
    "ZLoss",
    "gshard_load_balancing",
    "importance",
    "load_balancing",
    "z_loss",
]
