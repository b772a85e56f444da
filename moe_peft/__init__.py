"""Mixture-of-experts adapters for the stock Hugging Face stack. Importing it registers the adapter types with peft."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, version

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
from .expert_scores import ExpertScores
from .hub import push_adapter
from .integrations import CoefficientSchedule, FreezeCallback, MoeCallback, attach
from .methods import EsftConfig, LoraMoeConfig, MoloraConfig, MovConfig, PerftConfig, RoutedConfig, SiraConfig
from .objective import router_loss
from .quantization import MoeBitsAndBytesConfig
from .scoring import score_experts
from .selection import ExpertSelection, select_experts
from .selection_report import overlap_table, plot_selection, selection_table
from .types import MoePeftWarning

try:
    __version__ = version("peft-moe")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "CoefficientSchedule",
    "EsftConfig",
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
    "attach",
    "describe",
    "experts",
    "losses",
    "overlap_table",
    "plot_selection",
    "push_adapter",
    "router_loss",
    "routers",
    "score_experts",
    "select_experts",
    "selection_table",
    "telemetry",
]
