"""SiRA: sparse mixture of low-rank experts with a capacity and expert dropout.

    g = Dropout_p(softmax(Wg x)),   G = TopK(g)      not renormalised; survivors are divided by 1 - p
    y = W0 x + (alpha / r) sum_e G_e B_e A_e x       a pair over its expert's capacity adds nothing
    loss = task loss + coef * sum over layers of 1/E sum_e (c_e / n) mean_t g_te

Zhu et al., 2023, arXiv 2311.09179, which has no public code. Capacity is per sequence and serves tokens in order, so
that no later token changes an earlier one; dropout and capacity apply in training only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..config.absent import accepts_absent
from ..config.parts import RoutedParts
from ..forward.objective import Loss
from ..losses import gshard_load_balancing, z_loss
from ..place import Place
from ..tuner.registration import extend_peft_type, register
from ..tuner.tuner import RoutedTuner
from .build import build_parts
from .scale import PacedConfig

PEFT_TYPE = extend_peft_type("SIRA")


@accepts_absent
@dataclass
class SiraConfig(PacedConfig):
    """Configuration of SiRA. There is no public code to check against; the defaults are ours, in the paper's range."""

    method: ClassVar[str] = "SiRA"
    equation: ClassVar[str] = (
        "y = W0 x + (alpha / r) sum_e TopK(Dropout(softmax(Wg x)))_e B_e A_e x, at most C tokens per expert"
    )
    source: ClassVar[str] = "arXiv 2311.09179"
    adapter_type: ClassVar[str] = "SIRA"
    default_targets: ClassVar[Literal["ffn", "attention", "all"]] = "attention"
    fixed_fields: ClassVar[dict[str, str]] = {
        "router": "SiRA routes with a capacity (capacity_factor=None switches it off); RoutedConfig takes any router"
    }

    r: int = field(default=4, metadata={"help": "Rank of one expert."})
    num_experts: int = field(default=16, metadata={"help": "Experts at each layer."})
    top_k: int | None = field(default=4, metadata={"help": "Experts a token uses."})
    router: str = field(default="capacity", metadata={"help": "Name of the router; SiRA's is capacity."})
    capacity_factor: float | None = field(
        default=1.25,
        metadata={
            "help": "Places of an expert over its even share of a sequence's requests, in training; None: no limit."
        },
    )
    expert_dropout: float = field(
        default=0.1,
        metadata={"help": "Probability of dropping an expert's gate in training; survivors are divided by 1-p."},
    )
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the balance loss, per layer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer; see `MoeConfig.build`."""
        losses: dict[str, tuple[Loss, float]] = {
            "gshard_load_balancing": (gshard_load_balancing, self.router_aux_loss_coef),
            "z_loss": (z_loss, self.router_z_loss_coef),
        }
        return build_parts(self, place, losses=losses)


class SiraModel(RoutedTuner):
    """Tuner of SiRA adapters."""

    prefix: str = "sira_"


register(SiraConfig, SiraModel)
