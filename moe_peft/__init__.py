"""Mixture-of-experts adapters for the stock Hugging Face stack. Importing it registers the adapter types with peft."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, version
from typing import TYPE_CHECKING, Any

try:
    distribution("moe-peft")
except PackageNotFoundError:
    pass
else:
    raise ImportError(
        "The unrelated distribution 'moe-peft' owns the import name moe_peft as well: run `pip uninstall "
        "moe-peft`, then `pip install --force-reinstall peft-moe`."
    )

from . import experts, losses, routers, telemetry
from .describe import describe
from .forward import groups, router_loss
from .forward.replicas import synchronize_adapters
from .hub import push_adapter
from .integrations import CoefficientSchedule, FreezeCallback, MoeCallback, attach
from .layers import routed_layers
from .layers.accelerated_lora import accelerate_expert_lora
from .layers.after_step import after_step
from .messages import shown
from .methods import (
    EsftConfig,
    ExpertLoraConfig,
    LoraMoeConfig,
    MoloraConfig,
    MovConfig,
    PerftConfig,
    RoutedConfig,
    SiraConfig,
)
from .places.expert_parameters import expert_parameters
from .selection import (
    ExpertScores,
    ExpertSelection,
    join_selections,
    overlap_table,
    plot_selection,
    score_experts,
    select_experts,
    selection_table,
)
from .types import MoePeftWarning

if TYPE_CHECKING:
    from .quantization.loading import MoeBitsAndBytesConfig

try:
    __version__ = version("peft-moe")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "CoefficientSchedule",
    "EsftConfig",
    "ExpertLoraConfig",
    "ExpertScores",
    "ExpertSelection",
    "FreezeCallback",
    "LoraMoeConfig",
    "MoeBitsAndBytesConfig",
    "MoeCallback",
    "MoePeftWarning",
    "MoloraConfig",
    "MovConfig",
    "PerftConfig",
    "RoutedConfig",
    "SiraConfig",
    "accelerate_expert_lora",
    "after_step",
    "attach",
    "describe",
    "expert_parameters",
    "experts",
    "groups",
    "join_selections",
    "losses",
    "overlap_table",
    "plot_selection",
    "push_adapter",
    "routed_layers",
    "router_loss",
    "routers",
    "score_experts",
    "select_experts",
    "selection_table",
    "synchronize_adapters",
    "telemetry",
]


def __getattr__(name: str) -> Any:
    """Import what brings quantizers along when it is asked for, not with the package."""
    if name == "MoeBitsAndBytesConfig":
        from .quantization.loading import MoeBitsAndBytesConfig

        return MoeBitsAndBytesConfig
    raise AttributeError(f"module {__name__} has no attribute {shown(name)}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*__all__, "__version__"])
